"""Tables of the settings of endpoints and judges."""

from align.evaluation.load_judge import JudgeSettings
from finetune.endpoint.settings import EndpointSettings
from tools.docs.keys import TITLES, option_rows
from tools.docs.markdown import table


def endpoint_keys() -> str:
    """Return the settings of an endpoint."""
    return table(TITLES, option_rows(EndpointSettings))


def judge_keys() -> str:
    """Return the settings of a judge, without those of its endpoint."""
    return table(TITLES, [row for row in option_rows(JudgeSettings) if not row[0].startswith("`endpoint.")])
