"""Best-of-n sampling and tuning: replies are drawn, judged, and the best of them learnt."""
