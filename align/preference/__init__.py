"""What people prefer: rows of it, and later what is learnt from them."""
