"""Functions that no reward should be."""


def wants_a_number(prompt: str, response: str, number: int) -> float:
    return float(number)


def says_yes(prompt: str, response: str) -> str:
    return "yes"


def needs_memory(prompt: str, response: str, answer: str) -> float:
    """Needs more than there is for one of the answers."""
    return float(len(bytearray(2**60) if answer == "everything" else response))


def says_true(prompt: str, response: str) -> bool:
    return True
