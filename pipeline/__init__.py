"""Stage one and stage two: train a teacher, dump its answers, train students from them."""

__version__ = "0.1.0"


class NotFinite(RuntimeError):
    """A loss, a weight or an answer became NaN or infinite."""


class UserError(ValueError):
    """Something the user can put right: one line that says what was wrong, what was found and what to do."""
