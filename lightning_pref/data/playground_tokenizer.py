"""The playground's tokenizer: byte-level BPE, trained on the playground's own text in a blink."""

from collections import Counter
from functools import cache
from random import Random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_pref.data.playground_text import DOMAINS, draw_marks, draw_request, write_answer, write_context, write_request

VOCAB_SIZE = 576
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (PAD, BOS, EOS, *ROLES)
CORPUS_ROWS = 400

# A rendering only ever grows as messages are added, so the tokens of a prompt are a prefix of the tokens of the dialogue.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def playground_tokenizer() -> PreTrainedTokenizerFast:
    """A new tokenizer object for the playground's text; any other text round-trips too, byte by byte where need be."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(_trained()),
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


@cache
def _trained() -> str:
    """The tokenizer as JSON: special tokens, the 256 bytes, then the most frequent words of the world, whole.

    Whole words need no merges (`ignore_merges`), so that a vocabulary this small holds no fragments of words.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = Counter(piece for text in _corpus() for piece, _ in split.pre_tokenize_str(text))
    frequent = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL_TOKENS, *alphabet, *frequent][:VOCAB_SIZE]
    model = models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return str(tokenizer.to_str())


def _corpus() -> list[str]:
    texts = []
    for index in range(CORPUS_ROWS):
        rng = Random(f"tokenizer/{index}")
        for domain in DOMAINS:
            request = draw_request(domain, index % 2 == 0, rng)
            answer = write_answer(request, draw_marks(request, 0.5, rng), rng)
            texts += [write_context(request, rng), write_request(request, rng), answer]
    return texts
