"""Tool calls as JSON in chat templates: only new text is appended, and what the model wrote stays as it was."""

import json

import pytest
import scripted

from fastppo import TextEnvironment
from fastppo.environments.calls import ChatCalls, Part, encode_parts, schema_of
from fastppo.environments.tools import Calculator

# As Hermes' and Qwen's templates: tools in the system message, answers of tools in a user's turn.
TEMPLATE = """{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }} {% endif -%}
Tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role in ('user', 'assistant') %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% elif message.role == 'tool' %}
{%- if loop.previtem and loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}
<tool_response>
{{ message.content }}
</tool_response>
{%- if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>
{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# As templates that drop what an assistant thought as soon as its turn is not the last.
FORGETFUL = TEMPLATE.replace(
    "{{ message.content }}<|im_end|>\n{% elif message.role == 'tool' %}",
    "{% if loop.last %}<think></think>{% endif %}{{ message.content }}<|im_end|>\n{% elif message.role == 'tool' %}",
)


def add(first: int, second: int) -> int:
    """
    Add two numbers.

    Args:
        first: One.
        second: The other.
    """
    return first + second


def call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def environment(tools=(add,), template=TEMPLATE, **settings):
    codec = scripted.tokenizer(eos="<|im_end|>", template=template)
    options = {"reward_fn": lambda texts: [0.0] * len(texts), "call_format": "chat"} | settings
    return TextEnvironment(scripted.model(3000), codec, list(tools), **options)


def rendered(env, messages, is_open):
    """The whole conversation as the template itself writes it."""
    options = {"tools": [schema_of("add", add)], "add_generation_prompt": is_open, "tokenize": False}
    return env.tokenizer.apply_chat_template(messages, **options)


def test_an_episode_is_what_the_template_makes_of_the_whole_chat(monkeypatch):
    turns = [call("add", first=2, second=3), call("add", first=5, second=5) + "\n" + call("add", first=1, second=1)]
    said = [f"let me see\n{turns[0]}", turns[1], "the sum is 10"]
    env = environment(prompt="Be brief.", generation_kwargs={"max_new_tokens": 400})
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+3, then double"}]
    first = rendered(env, chat, True)
    chat += [{"role": "assistant", "content": said[0]}, {"role": "tool", "content": "5"}]
    chat += [{"role": "assistant", "content": said[1]}, {"role": "tool", "content": "10"}]
    chat += [{"role": "tool", "content": "2"}, {"role": "assistant", "content": said[2]}]
    whole = rendered(env, chat, False)
    scripted.say(monkeypatch, [whole[len(first) :]])
    (query,), (response,), (mask,), _, (history,) = env.run(["2+3, then double"])
    # To the last token what one encoding of the whole would be; the template ends with a line break, the model before.
    assert env.tokenizer.decode(query) == first
    encoded = env.tokenizer(whole, add_special_tokens=False)["input_ids"][:-1]
    assert [*query.tolist(), *response.tolist()] == encoded
    assert history.text + "\n" == whole
    model_text = env.tokenizer.decode(response[mask.bool()])
    assert model_text == "".join(f"{turn}<|im_end|>" for turn in said)
    assert (history.end_reason, [entry.response for entry in history.calls]) == ("answer", ["5", "10", "2"])
    assert history.calls[0].query == {"first": 2, "second": 3}


def test_bad_calls_are_answered(monkeypatch):
    def fails(name, text):
        env = environment(max_turns=1)
        scripted.say(monkeypatch, [f"{text}<|im_end|>" + "x" * 300])
        *_, (history,) = env.run([[{"role": "user", "content": "go"}]])
        assert history.calls[0].error == name
        assert history.calls[0].response in history.text
        return history.calls[0].response

    assert fails("unparsable", "<tool_call>{nonsense</tool_call>") == "Unknown tool call: {nonsense"
    assert fails("unparsable", '<tool_call>["add"]</tool_call>') == 'Unknown tool call: ["add"]'
    assert fails("unparsable", '<tool_call>{"name": "add"}</tool_call>').startswith("Unknown tool call")
    assert fails("unknown tool", call("sub", first=1)) == "Unknown tool sub."
    assert "unexpected keyword argument" in fails("exception", call("add", third=1))


def test_a_turn_may_have_more_than_ten_calls():
    codec = scripted.tokenizer(eos="<|im_end|>", template=TEMPLATE)
    parts = ChatCalls("", codec, {"add": add}).answer("", [f"<{i}>" for i in range(12)])
    between = "\n</tool_response><tool_response>\n"
    expected = "<|im_end|>\n<|im_start|>user<tool_response>\n"
    expected += between.join(f"<{i}>" for i in range(12))
    assert "".join(part.text for part in parts).startswith(expected + "\n</tool_response><|im_end|>")


def test_half_a_character_and_endless_brackets_are_data(monkeypatch):
    def response(text):
        env = environment(max_turns=1, generation_kwargs={"max_new_tokens": 300})
        scripted.say(monkeypatch, [f"<tool_call>{text}</tool_call><|im_end|>" + "x" * 300])
        *_, (history,) = env.run(["go"])
        return history.calls[0].response

    assert response('{"name": "\\ud800", "arguments": {}}') == "Unknown tool ?."
    assert "concatenate" in response('{"name": "add", "arguments": {"first": "\\ud800", "second": 1}}')
    request = ChatCalls("", scripted.tokenizer(template=TEMPLATE), {}).requests(f"<tool_call>{'[' * 9**5}</tool_call>")
    assert request[0].error == "unparsable"


def test_arguments_may_be_a_json_text(monkeypatch):
    scripted.say(
        monkeypatch,
        [
            '<tool_call>{"name": "add", "arguments": "{\\"first\\": 1, \\"second\\": 2}"}</tool_call><|im_end|>'
            + "x" * 99
        ],
    )
    *_, (history,) = environment(max_turns=1).run(["go"])
    assert history.calls[0].response == "3"


def test_templates_that_rewrite_turns_are_refused():
    with pytest.raises(ValueError, match="does not append a tool's answer to the turns before it"):
        environment(template=FORGETFUL)
    with pytest.raises(ValueError, match="expected a text, or a list of messages"):
        environment().run([[]])


def test_tools_describe_themselves():
    schema = schema_of("calc", Calculator())["function"]
    assert schema["name"] == "calc"
    assert schema["description"] == "Work out an arithmetic expression."
    assert schema["parameters"]["properties"] == {
        "expression": {"type": "string", "description": "The expression, such as (2 + 3) * 4."}
    }
    assert schema["parameters"]["required"] == ["expression"]


def test_a_result_is_encoded_with_its_frame_unless_it_holds_special_tokens():
    codec = scripted.tokenizer(template=TEMPLATE)
    frame = ChatCalls("", codec, {"add": add}).answer("5", ["a", "b"])
    assert "".join(part.text for part in frame).count("<tool_response>") == 2
    # `ab` is one token: encoded together it stays one.
    assert encode_parts(codec, [Part("a", False), Part("b", True)]) == [256]
    marked = encode_parts(codec, [Part("<|im_end|>a", False), Part("b<|im_end|>", True)])
    assert marked[-1] == codec.convert_tokens_to_ids("<|im_end|>")
    assert codec.decode(marked) == "<|im_end|>ab<|im_end|>"
    assert marked.count(marked[-1]) == 1
