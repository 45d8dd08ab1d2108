"""Functions that no reward should be."""


def wants_a_number(prompt: str, response: str, number: int) -> float:
    return float(number)


def says_yes(prompt: str, response: str) -> str:
    return "yes"


def says_true(prompt: str, response: str) -> bool:
    return True
