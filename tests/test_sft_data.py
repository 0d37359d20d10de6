"""What SFTTrainer makes of a dataset: which tokens are learned, where documents lie, what is refused."""

import json

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fastppo import DataCollatorForCompletionOnlyLM
from fastppo.trainers.documents import IGNORED, Corpus, Documents, best_fit, side_by_side
from fastppo.trainers.encoding import Encoder
from fastppo.trainers.sft import Stream, prepare

WORDS = ["<s>", "</s>", "<pad>", "the", "cat", "sat", "on", "a", "mat", "dog", "ran", "far", "away", "."]
WORDS += ["user:", "bot:", "tool:", "[", "]"]
# Every turn in brackets; the prompt for an answer is an open bracket.
PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': [ ' + m['content'] + ' ] ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'bot: [ ' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'bot' or m['role'] == 'assistant' %}bot: [ "
    "{% generation %}{{ m['content'] + ' ] ' }}{% endgeneration %}"
    "{% else %}{{ m['role'] + ': [ ' + m['content'] + ' ] ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'bot: [ ' }}{% endif %}"
)
# Writes the number of turns in front, so that no chat is the beginning of a longer one.
COUNTING = "{{ messages | length }} " + PLAIN


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=32
    )


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, which joins a space with the word after it and cuts no template where a person would."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    texts = ["### Question: what is it?\n### Answer: it is so", "naïve café\n### Answer:yes", "###Answer ##"] * 3
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    inner.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def encode(rows, tokenizer, max_length=32, **more):
    """Return the documents of a dataset as lists."""
    corpus = Encoder(tokenizer, max_length, **more).encode(rows)
    return [{name: row[name] for name in ("input_ids", "labels")} for row in (corpus[i] for i in range(len(corpus)))]


def learned(row, tokenizer) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


def test_a_text_is_learned_with_its_end(tokenizer):
    [row] = encode([{"text": "the cat sat"}], tokenizer)
    assert row == {"input_ids": ids("the cat sat </s>"), "labels": [IGNORED, *ids("cat sat </s>")]}


def test_a_cut_text_is_not_taught_to_end(tokenizer):
    [row] = encode([{"text": "the cat sat"}], tokenizer, 3)
    assert row["input_ids"] == ids("the cat sat")


def test_an_end_in_the_text_is_not_doubled(tokenizer):
    [row] = encode([{"text": "the cat </s>"}], tokenizer)
    assert row["input_ids"] == ids("the cat </s>")
    assert row["labels"][-1] == tokenizer.eos_token_id


def test_only_the_completion_is_learned_unless_told_otherwise(tokenizer):
    rows = [{"prompt": "the cat", "completion": " ran away"}]
    [row] = encode(rows, tokenizer)
    assert row["input_ids"] == ids("the cat ran away </s>")
    assert row["labels"] == [IGNORED, IGNORED, *ids("ran away </s>")]
    [whole] = encode(rows, tokenizer, completion_only=False)
    assert whole["labels"] == [IGNORED, *ids("cat ran away </s>")]
    with pytest.raises(ValueError, match="completion_only_loss=True, but a row has columns"):
        encode([{"text": "the cat"}], tokenizer, completion_only=True)


def test_a_token_that_reaches_into_the_completion_is_learned(bytes_tokenizer):
    # " yes" may be one token although the prompt ends before its space, or in it.
    rows = [{"prompt": "### Question: what?\n### Answer: ", "completion": "it is so"}]
    [row] = encode(rows, bytes_tokenizer)
    assert bytes_tokenizer.decode(row["input_ids"]) == "### Question: what?\n### Answer: it is so</s>"
    text = learned(row, bytes_tokenizer)
    assert text.lstrip(" ") == "it is so</s>"
    assert len(text) - len("it is so</s>") <= 1


def test_rows_without_anything_to_learn_are_left_out_or_refused(tokenizer):
    long_prompt = {"prompt": "the cat sat on a mat", "completion": " ran"}
    assert len(encode([long_prompt, {"text": "a dog"}], tokenizer, 4)) == 1
    with pytest.raises(ValueError, match="max_seq_length"):
        encode([long_prompt], tokenizer, 4)


@pytest.mark.parametrize("batched", [False, True])
def test_formatters_of_one_row_and_of_columns(tokenizer, batched):
    rows = [{"a": "the cat", "n": 1}, {"a": "a dog", "n": 2}, {"a": "the mat", "n": 3}]

    def of_row(row):
        return row["a"] + " ran"

    def of_columns(columns):  # as TRL 0.7 wanted it; on a single row it walks through letters
        return [columns["a"][i] + " ran" for i in range(len(columns["a"]))]

    found = encode(rows, tokenizer, formatting_func=of_columns if batched else of_row, batch_size=2)
    assert [row["input_ids"] for row in found] == [ids(f"{row['a']} ran </s>") for row in rows]


def test_what_a_dataset_cannot_mean_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"columns \['review'\], expected a text in 'text'"):
        encode([{"review": "the cat"}], tokenizer)
    with pytest.raises(ValueError, match=r"formatting_func returned \['the cat'\] of type list"):
        encode([{"review": "the cat"}], tokenizer, formatting_func=lambda row: [row["review"]])
    with pytest.raises(ValueError, match="formatting_func returned 3 of type int"):
        encode([{"review": "the cat"}], tokenizer, formatting_func=lambda row: [3])
    with pytest.raises(ValueError, match="`completion` 5, expected two texts"):
        encode([{"prompt": "the", "completion": 5}], tokenizer)
    with pytest.raises(ValueError, match="has no chat template"):
        encode([{"messages": [{"role": "user", "content": "the cat"}]}], tokenizer)
    with pytest.raises(ValueError, match="completion_only_loss=True with formatting_func="):
        encode([{"text": "the cat"}], tokenizer, formatting_func=lambda row: row["text"], completion_only=True)
    with pytest.raises(ValueError, match="the text 'the cat', expected a chat"):
        encode([{"text": "the cat"}], tokenizer, assistant_only=True)


def test_texts_without_an_end_token_have_none(tokenizer):
    tokenizer.eos_token = None
    rows = encode([{"text": "the cat sat"}, {"prompt": "the cat", "completion": " ran"}], tokenizer)
    assert [row["input_ids"] for row in rows] == [ids("the cat sat"), ids("the cat ran")]
    assert [row["labels"] for row in rows] == [[IGNORED, *ids("cat sat")], [IGNORED, IGNORED, *ids("ran")]]
    with pytest.raises(ValueError, match="none of 2 rows"):
        encode([{"prompt": "the cat", "completion": ""}, {"text": ""}], tokenizer)


def test_tokenised_rows_stay_as_they_are(tokenizer):
    rows = [{"input_ids": torch.tensor([3, 4, 5])}, {"input_ids": [6, 7, 8], "labels": [IGNORED, IGNORED, 8]}]
    assert encode(rows, tokenizer) == [
        {"input_ids": [3, 4, 5], "labels": [IGNORED, 4, 5]},
        {"input_ids": [6, 7, 8], "labels": [IGNORED, IGNORED, 8]},
    ]


def test_padding_of_tokenised_rows_is_not_learned(tokenizer):
    left = {"input_ids": [0, 0, 3, 4], "attention_mask": [0, 0, 1, 1]}
    right = {"input_ids": torch.tensor([3, 4, 0]), "attention_mask": torch.tensor([1, 1, 0]), "labels": [3, 4, 0]}
    assert encode([left, right], tokenizer) == [{"input_ids": [3, 4], "labels": [IGNORED, 4]}] * 2


CHAT = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on"},
    {"role": "user", "content": "a dog"},
    {"role": "assistant", "content": "ran far"},
]
TEXT = "user: [ the cat ] assistant: [ sat on ] user: [ a dog ] assistant: [ ran far ]"


@pytest.mark.parametrize("column", ["messages", "conversations", "story"])
def test_a_chat_is_rendered_by_the_template(tokenizer, column):
    tokenizer.chat_template = PLAIN.replace("m['role']", "('bot' if m['role'] == 'assistant' else m['role'])")
    chat = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in CHAT]
    [row] = encode([{column: CHAT if column != "conversations" else chat}], tokenizer, text_field="story")
    assert row["input_ids"] == ids(TEXT.replace("assistant", "bot"))
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]


@pytest.mark.parametrize("template", ["plain", "marked"])
def test_only_the_assistant_is_learned(tokenizer, template):
    tokenizer.chat_template = MARKED
    if template == "plain":
        tokenizer.chat_template = PLAIN.replace("m['role']", "('bot' if m['role'] == 'assistant' else m['role'])")
    [row] = encode([{"messages": CHAT}], tokenizer, assistant_only=True)
    assert tokenizer.decode(row["input_ids"]) == TEXT.replace("assistant", "bot")
    assert learned(row, tokenizer) == "sat on ] ran far ]"


def test_a_chat_as_prompt_and_completion(tokenizer):
    tokenizer.chat_template = PLAIN.replace("m['role']", "('bot' if m['role'] == 'assistant' else m['role'])")
    rows = [{"prompt": CHAT[:3], "completion": CHAT[3:]}]
    [row] = encode(rows, tokenizer)
    assert learned(row, tokenizer) == "ran far ]"
    [both] = encode(rows, tokenizer, assistant_only=True)
    assert learned(both, tokenizer) == "sat on ] ran far ]"


def test_a_template_that_changes_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = COUNTING.replace("m['role']", "('bot' if m['role'] == 'assistant' else m['role'])")
    with pytest.raises(ValueError, match="alone otherwise than in the whole chat: '1 user"):
        encode([{"messages": CHAT}], tokenizer, assistant_only=True)
    with pytest.raises(ValueError, match="the prompt alone otherwise"):
        encode([{"prompt": CHAT[:3], "completion": CHAT[3:]}], tokenizer)


def test_tools_reach_the_template(tokenizer):
    tokenizer.chat_template = "{% for t in tools or [] %}{{ 'tool: ' + t['name'] + ' ' }}{% endfor %}" + PLAIN
    [row] = encode([{"messages": CHAT[:1], "tools": [{"name": "far"}]}], tokenizer)
    assert tokenizer.decode(row["input_ids"]) == "tool: far user: [ the cat ]"


@pytest.fixture(scope="session")
def golden(shared_path):
    return json.loads(shared_path("golden/trl_v074_math.json").read_text())


@pytest.mark.parametrize(
    ("name", "templates"),
    [("completion_only_response_[7,8]", ([7, 8],)), ("completion_only_instr_[5,6]_resp_[7,8]", ([7, 8], [5, 6]))],
)
def test_the_old_collator_masks_as_trl_did(tokenizer, golden, name, templates):
    collator = DataCollatorForCompletionOnlyLM(*templates, tokenizer=tokenizer)
    rows = golden[name]
    batch = collator([{"input_ids": row["ids"]} for row in rows])
    for row, labels, mask in zip(rows, batch["labels"], batch["attention_mask"], strict=True):
        expected = torch.tensor(row["labels"])
        assert mask.sum() == len(expected)
        # TRL took every padding token for padding, a real one too.
        assert labels[: len(expected)].tolist() == expected.tolist()
        assert labels[len(expected) :].eq(IGNORED).all()


def test_the_old_collator_pads_on_the_tokenizer_s_side_and_keeps_a_real_end(tokenizer):
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    collator = DataCollatorForCompletionOnlyLM("bot:", tokenizer=tokenizer)
    batch = collator([ids("the bot: cat </s>"), ids("the dog bot: sat on </s>")])
    end = tokenizer.eos_token_id
    assert batch["input_ids"][0].tolist() == [end, end, *ids("the bot: cat </s>")]
    assert batch["labels"][0].tolist() == [IGNORED] * 4 + ids("cat </s>")
    assert batch["attention_mask"][0].tolist() == [0, 0, 1, 1, 1, 1]


def test_a_template_is_found_however_it_is_tokenised(bytes_tokenizer):
    # In the text the template's first and last characters are parts of other tokens, where its own tokens are not.
    template = "###Answer:"
    text = "x####Answer:yes, it is"
    alone = bytes_tokenizer(template)["input_ids"]
    there = bytes_tokenizer(text)["input_ids"]
    assert not any(there[i : i + len(alone)] == alone for i in range(len(there)))
    collator = DataCollatorForCompletionOnlyLM(template, tokenizer=bytes_tokenizer)
    [row] = encode([{"text": text}], bytes_tokenizer, answers=collator)
    assert learned(row, bytes_tokenizer) == "yes, it is</s>"


def test_turns_between_templates_are_learned_and_the_last_question_is_not(tokenizer, caplog):
    collator = DataCollatorForCompletionOnlyLM("bot:", "user:", tokenizer=tokenizer)
    texts = ["user: the cat bot: sat on user: a dog bot: ran", "user: the cat bot: sat on user: a dog", "the cat bot:"]
    rows = encode([{"text": text} for text in texts], tokenizer, answers=collator)
    assert [learned(row, tokenizer) for row in rows] == ["sat on ran </s>", "sat on"]
    assert "a row holds no 'bot:' or no 'user:'" in caplog.text
    by_ids = DataCollatorForCompletionOnlyLM(ids("bot:"), ids("user:"), tokenizer=tokenizer)
    same = encode([{"text": text} for text in texts], tokenizer, answers=by_ids)
    assert [learned(row, tokenizer) for row in same] == ["sat on ran </s>", "sat on"]


def test_the_old_collator_s_own_mark_is_not_taken_for_a_token(tokenizer):
    collator = DataCollatorForCompletionOnlyLM(ids("sat"), tokenizer=tokenizer, ignore_index=-1)
    [row] = encode([{"text": "the cat sat on"}], tokenizer, answers=collator)
    assert row["labels"] == [IGNORED, IGNORED, IGNORED, *ids("on </s>")]
    [row] = encode([{"input_ids": ids("the cat sat on")}], tokenizer, answers=collator)
    assert row["labels"] == [IGNORED, IGNORED, IGNORED, *ids("on")]


def test_templates_that_cannot_work_are_refused(tokenizer):
    for arguments in (("",), ([],), ("bot:", [3]), ("bot:", "")):
        with pytest.raises(ValueError, match="expected texts, or lists of token ids"):
            DataCollatorForCompletionOnlyLM(*arguments, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="expected a tokenizer and False"):
        DataCollatorForCompletionOnlyLM("bot:", tokenizer=tokenizer, mlm=True)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), max_size=40), st.integers(8, 32))
def test_packing_loses_no_document_and_overfills_no_row(lengths, capacity):
    rows = best_fit(lengths, capacity)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    assert all(len(row) == 1 or sum(lengths[number] for number in row) <= capacity for row in rows)
    # Best fit decreasing needs at most 11/9 of the least number of rows, and one more.
    least = -(-sum(min(length, capacity) for length in lengths) // capacity)
    halves = sum(2 * length > capacity for length in lengths)
    assert len(rows) <= 11 / 9 * max(least * 3 / 2, halves) + 1


def test_the_fullest_row_with_room_is_taken():
    assert best_fit([5, 6, 4, 3, 2], 10) == [[0, 3, 4], [1, 2]]


def test_a_batch_knows_its_documents_whatever_the_collator():
    corpus = Corpus([{"input_ids": [3, 4, 5], "labels": [IGNORED, 4, 5]}, {"input_ids": [6, 7], "labels": [6, 7]}])
    flat = side_by_side([corpus.pack(8)[0]])
    assert flat["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    padded = {
        "input_ids": torch.tensor([[3, 4, 5], [2, 6, 7]]),
        "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]]),
        "labels": torch.tensor([[3, 4, 5], [IGNORED, 6, 7]]),
    }
    for batch in (flat, padded):
        documents = Documents.of(batch)
        assert [tokens.tolist() for tokens in documents.tokens] == [[3, 4, 5], [6, 7]]
        assert [labels.tolist() for labels in documents.labels] == [[IGNORED, 4, 5], [IGNORED, 7]]
        assert documents.count == 3


def test_a_stream_is_encoded_and_packed_as_it_is_read(tokenizer):
    def rows():
        for number in range(7):
            yield {"text": " ".join(["cat"] * (number + 1))}

    stream = datasets.IterableDataset.from_generator(rows)
    encoder = Encoder(tokenizer, 9, batch_size=4)
    assert isinstance(prepare(stream, encoder, True), Stream)
    packed = list(prepare(stream, encoder, True))
    # Four documents at a time, of 2 to 5 and 6 to 8 tokens: the longest first, into the fullest row with room.
    assert [len(row["input_ids"]) for row in packed] == [5, 9, 6, 7, 8]
    assert sum(row["position_ids"].count(0) for row in packed) == 7
    assert len(list(prepare(stream, encoder, False))) == 7
