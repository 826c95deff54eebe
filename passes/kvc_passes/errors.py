"""The errors kvc raises on purpose. Each carries one message that a person can act on."""


class Error(Exception):
    """Base of every error that kvc raises on purpose."""


class InputError(Error):
    """A file, an option or a value given by the user cannot be used as it is."""


class UnsupportedModel(Error):
    """A model fails an import rule or a proof; the message names the ONNX node and the rule."""


class TargetError(Error):
    """The target is unknown, or this machine lacks what building or running for it needs."""


class BudgetError(Error):
    """The workload does not fit the budget.

    Attributes:
        needed: bytes that the workload needs, the smallest budget that works.
        given: bytes of the budget.
    """

    def __init__(self, message: str, *, needed: int, given: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.given = given


class PlanningError(Error):
    """kvc broke a promise of its own (a bug): a size it counted differs from what it built."""
