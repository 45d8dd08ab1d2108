import string
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_pref.data.playground import explain, gold_reward, playground_rows, proxy_reward
from lightning_pref.data.playground_text import Mark, Request, read_request, write_answer
from lightning_pref.data.playground_tokenizer import playground_tokenizer

TABLE = "Hello, I am Anna. Please book a table for four at 7 pm. I cannot eat nuts. Be warm with us."
SHORT = "Hello, I am Anna. Please book a table for four at 7 pm. I cannot eat nuts. Keep the answer short."
MENU = "You host guests at the Blue Door. Menu today: ramen (eggs, meat, wheat); korma (meat, milk, nuts)."
TRIP = "Good morning, Omar here. I need two seats to Oslo on Friday. I go by train and dislike buses. Only the facts."
GATES = "This is the desk of Swan Travel. Gates today: Rome 2, Oslo 7, Cairo 4."

GOOD_TABLE = "Gladly, Anna. A table for four is set at 7 pm. Try the ramen. Enjoy your meal!"
GOOD_TRIP = "Happy to help, Omar. I booked two seats to Oslo on Friday. You leave by train."


# From the best to the worst answer, as anyone would order them.
@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        (
            TABLE,
            [
                GOOD_TABLE,
                "Gladly, Anna. A table for four is set at 7 pm. Try the ramen.",
                "Gladly, Anna. A table for four is set at 7 pm. Try the korma.",
                "Fine, Anna. A table for four is set at 7 pm. Try the korma. Do not be late.",
                "Fine, Ben. A table for four is set at 9 pm. Try the korma. Do not be late.",
                "",
            ],
        ),
        (
            f"{GATES} {TRIP}",
            [
                f"{GOOD_TRIP[:-1]} from gate 7.",
                GOOD_TRIP,
                "Happy to help, Omar. I booked two seats to Oslo on Friday. You leave by bus.",
                "So what, Omar. I booked two seats to Rome on Friday. You leave by bus. Stop asking me.",
                "You leave.",
                "",
            ],
        ),
    ],
)
def test_the_gold_reward_orders_answers_as_a_person_would(prompt: str, answers: list[str]) -> None:
    golds = [gold_reward(prompt, answer) for answer in answers]
    assert golds == sorted(set(golds), reverse=True)
    assert golds[0] == 1.0 and golds[-1] == 0.0


def test_the_parts_of_an_answer_are_read_one_by_one() -> None:
    answer = "Gladly, Ben. Your table for four will be ready at 9 pm. Try the korma. Do not complain."
    assert explain(f"{MENU} {TABLE}", answer) == {
        "reads": 1.0,
        "concise": 1.0,
        "name": 0.0,
        "guests": 1.0,
        "time": 0.0,
        "safe": 0.0,
        "offered": 1.0,
        "courtesy": 0.5,
        "warmth": 0.0,
    }
    # (guests 1 + offered 1 + courtesy 0.5) of the weights 1 + 1 + 1 + 2 + 1 + 1 + 1
    assert gold_reward(f"{MENU} {TABLE}", answer) == pytest.approx(2.5 / 8)


@pytest.mark.parametrize(
    ("prompt", "answer", "part"),
    [
        (f"{MENU} {TABLE}", GOOD_TABLE.replace("ramen", "quiche"), "offered"),
        (f"{GATES} {TRIP}", f"{GOOD_TRIP[:-1]} from gate 2.", "gate"),
        (TRIP, GOOD_TRIP.replace("two seats", "three seats"), "tickets"),
        (TRIP, GOOD_TRIP.replace("Friday", "Sunday"), "day"),
        (TRIP, GOOD_TRIP.replace(" by train", ""), "means"),
        (TABLE, GOOD_TABLE.replace(", Anna", ""), "name"),
    ],
)
def test_a_wrong_or_missing_fact_costs_its_part_alone(prompt: str, answer: str, part: str) -> None:
    parts = explain(prompt, answer)
    assert parts.pop(part) == 0.0
    assert set(parts.values()) == {1.0}


def test_naming_every_value_earns_nothing() -> None:
    parts = explain(TABLE, GOOD_TABLE.replace("the ramen", "the ramen, the paella, the korma"))
    assert parts["safe"] == 0.0
    assert explain(TRIP, GOOD_TRIP + " You leave by bus.")["means"] == 0.0


def test_repeating_a_good_answer_makes_it_worse() -> None:
    golds = [gold_reward(TRIP, " ".join([GOOD_TRIP] * times)) for times in (1, 2, 4, 8)]
    assert golds == sorted(set(golds), reverse=True)
    assert golds[-1] < 0.2


def test_longer_is_only_worse_beyond_the_wished_length() -> None:
    extra = GOOD_TABLE.replace("Enjoy", "Our cook sings at night. The garden smells of rain. Enjoy")
    assert explain(SHORT, GOOD_TABLE)["concise"] == 1.0
    assert explain(SHORT, extra)["concise"] < explain(TABLE, extra)["concise"] < 1.0


@given(st.text(max_size=200), st.sampled_from([TABLE, SHORT, TRIP, f"{MENU} {TABLE}", f"{GATES} {TRIP}"]))
def test_rewards_and_parts_stay_in_bounds_whatever_the_text(answer: str, prompt: str) -> None:
    assert all(0.0 <= part <= 1.0 for part in explain(prompt, answer).values())
    assert 0.0 <= gold_reward(prompt, answer) <= 1.0
    assert 0.0 <= proxy_reward(prompt, answer, "length") <= 1.0


def test_garbage_scores_low() -> None:
    rng, tokenizer = Random(0), playground_tokenizer()
    letters = ["".join(rng.choices(string.ascii_letters + " .,", k=120)) for _ in range(100)]
    tokens = [str(tokenizer.decode(rng.choices(range(len(tokenizer)), k=30))) for _ in range(100)]
    shuffled = [" ".join(rng.sample(GOOD_TABLE.split(), k=len(GOOD_TABLE.split()))) for _ in range(100)]
    assert max(gold_reward(TABLE, text) for text in letters + tokens) < 0.05
    assert sum(gold_reward(TABLE, text) for text in shuffled) / 100 < 0.15


def test_every_prompt_has_an_answer_of_gold_one_and_spoiling_any_part_lowers_it() -> None:
    for row in playground_rows("prompts", 60, long_prompts=0.5):
        prompt = "\n".join(message["content"] for message in row["prompt"])
        request: Request = read_request(prompt)
        slots = {slot for slot, _ in request.accepted().values()}
        best: dict[str, Mark] = dict.fromkeys([*slots, "opening", "closing", "length"], "right")
        assert gold_reward(prompt, write_answer(request, best, Random(0))) == 1.0
        for part in best:
            assert gold_reward(prompt, write_answer(request, {**best, part: "wrong"}, Random(0))) < 1.0


def test_the_reward_is_the_same_from_messages_templated_text_and_decoded_text() -> None:
    tokenizer = playground_tokenizer()
    for row in playground_rows("sft", 20, long_prompts=0.5):
        gold, answer = gold_reward(row["prompt"], row["completion"]), row["completion"][0]["content"]
        templated = str(tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True))
        decoded = tokenizer.decode(tokenizer(templated)["input_ids"], skip_special_tokens=True)
        assert isinstance(decoded, str)
        assert gold_reward(templated, answer) == gold == gold_reward(decoded, answer)


def test_the_length_flaw_pays_for_words_the_gold_does_not() -> None:
    padded = f"{GOOD_TRIP} {'My uncle collects old maps. ' * 8}"
    assert proxy_reward(TRIP, padded, "length") > proxy_reward(TRIP, GOOD_TRIP, "length")
    assert gold_reward(TRIP, padded) < gold_reward(TRIP, GOOD_TRIP)
    assert proxy_reward(TRIP, padded) == gold_reward(TRIP, padded)


def test_of_two_answers_as_long_the_flawed_judge_still_prefers_the_better() -> None:
    worse = GOOD_TRIP.replace("by train", "by bus")
    assert proxy_reward(TRIP, GOOD_TRIP, "length") > proxy_reward(TRIP, worse, "length")


def test_an_unknown_flaw_is_refused() -> None:
    with pytest.raises(ValueError, match="`flaw` must be None or 'length', got 'tone'"):
        proxy_reward(TRIP, GOOD_TRIP, "tone")  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", ["What is the capital of France?", SHORT.removesuffix(" Keep the answer short.")])
def test_a_foreign_prompt_has_no_gold_reward(prompt: str) -> None:
    with pytest.raises(ValueError, match="no prompt of the playground: '(What is|Hello, I)"):
        gold_reward(prompt, "Paris.")
