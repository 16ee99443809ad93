"""The tiny checkpoint's text side: dialogues, tokenizer, chat template, and the files' shape. No model runs here."""

import itertools
import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3dist.tiny import DEMO_ANSWER, DEMO_PROMPT, PATH
from m3dist.tiny.dialogues import EXAMINED, MODES, NS, held_out, is_held_out, train_dialogues

tokenizers = pytest.importorskip("tokenizers")
sandbox = pytest.importorskip("jinja2.sandbox")

CONFIG = json.loads((PATH / "config.json").read_text())
TEXT = CONFIG["text_config"]
MARKERS = ["<mm:think>", "</mm:think>", NS]


def refuse(message):
    raise ValueError(message)


@pytest.fixture(scope="module")
def questions():
    return held_out()


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.Tokenizer.from_file(str(PATH / "tokenizer.json"))


@pytest.fixture(scope="module")
def render():
    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    template = environment.from_string((PATH / "chat_template.jinja").read_text())
    return lambda messages, **names: template.render(messages=messages, **names)


def prompt_of(question, render):
    return render(question.messages, tools=question.tools, thinking_mode=question.thinking, add_generation_prompt=True)


def tensor_table():
    """Name, dtype and shape of every tensor, from the safetensors header."""
    with open(PATH / "model.safetensors", "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}


# --- dialogues ------------------------------------------------------------------------------------


def test_held_out_questions_are_always_the_same(questions):
    assert held_out() == questions
    assert held_out(n=20) == questions[:20]
    assert held_out(n=20, seed=1) != questions[:20]


def test_held_out_questions_cover_every_kind_and_mode(questions):
    kinds = [question.kind for question in questions]
    assert set(kinds) == set(EXAMINED)
    assert kinds.count("recall_far") >= 30
    assert {question.thinking for question in questions} == set(MODES)


def test_training_never_meets_a_held_out_conversation(questions):
    assert all(is_held_out(question.messages, question.tools) for question in questions)
    for talk in itertools.islice(train_dialogues(seed=1), 3000):
        for end, message in enumerate(talk.messages):
            if message["role"] == "assistant":
                assert not is_held_out(talk.messages[:end], talk.tools)


def test_training_dialogues_follow_their_seed():
    first, again, other = (list(itertools.islice(train_dialogues(seed), 20)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_far_facts_lie_beyond_the_sparse_budget(questions, tokenizer, render):
    sparse = TEXT["sparse_attention_config"]
    budget = sparse["sparse_block_size"] * sparse["sparse_topk_blocks"]
    for question in questions:
        if question.kind == "recall_far":
            value = question.answer.split()[-1].rstrip(".")
            after = prompt_of(question, render).rsplit(value, 1)[1]
            assert len(tokenizer.encode(after).ids) > budget


# --- tokenizer --------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(text):
    tokenizer = tokenizers.Tokenizer.from_file(str(PATH / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(i < TEXT["vocab_size"] for i in ids)


def test_digits_are_single_tokens(tokenizer):
    assert tokenizer.encode("2026").tokens == list("2026")


def test_markers_are_single_tokens_and_only_turn_markers_are_hidden(tokenizer):
    for name, text in (("bos", "]~!b["), ("eos", "[e~["), ("pad", "]!p~[")):
        assert tokenizer.token_to_id(text) == TEXT[f"{name}_token_id"] == CONFIG[f"{name}_token_id"]
    for text in [*MARKERS, "]~b]", "[e~[", "]~!b["]:
        ids = tokenizer.encode(f"a{text}b").ids
        assert ids[1] == tokenizer.token_to_id(text)
        assert (text in tokenizer.decode(ids, skip_special_tokens=True)) == (text in MARKERS)


# --- chat template ------------------------------------------------------------------------------------


def test_answers_are_what_the_template_writes(questions, render):
    """Prompt, answer and turn end make the same text as the conversation with the reply in it."""
    reply = {"role": "assistant", "content": "Yes.", "reasoning_content": "Why not?"}
    messages = [{"role": "user", "content": "Is it?"}]
    prompts = {mode: render(messages, thinking_mode=mode, add_generation_prompt=True) for mode in MODES}
    whole = render([*messages, reply])
    assert whole == "]~!b[]~b]user\nIs it?[e~[\n]~b]ai\n<mm:think>Why not?</mm:think>Yes.[e~[\n"
    assert prompts["enabled"] + "Why not?</mm:think>Yes.[e~[\n" == whole
    assert prompts["adaptive"] == render(messages, add_generation_prompt=True)
    assert prompts["disabled"] + "Yes.[e~[\n" == render([*messages, reply | {"reasoning_content": None}])


def test_tool_calls_are_written_as_the_answers_have_them(questions, render):
    for question in questions:
        if question.kind == "tool_answer":
            call = next(m for m in reversed(question.messages) if m.get("tool_calls"))
            text = prompt_of(question, render)
            for entry in call["tool_calls"]:
                for key, value in entry["function"]["arguments"].items():
                    assert f"{NS}<{key}>{value}{NS}</{key}>" in text
    calls = [question for question in questions if question.kind == "tool_call"]
    assert all(f'{NS}<invoke name="' in question.answer for question in calls)


def test_structured_arguments(render):
    arguments = {"flag": True, "none": None, "list": [1, "a"], "map": {"k": 0.5}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    text = render([{"role": "user", "content": "x"}, call])
    assert f"{NS}<flag>true{NS}</flag>{NS}<list>{NS}<item>1{NS}</item>{NS}<item>a{NS}</item>{NS}</list>" in text
    assert f"{NS}<map>{NS}<k>0.5{NS}</k>{NS}</map>" in text
    assert "none" not in text


def test_consecutive_tool_results_share_a_turn(render):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}] * 2}
    results = [{"role": "tool", "content": text} for text in "ab"]
    text = render([{"role": "user", "content": "x"}, call, *results])
    assert text.endswith("]~b]tool\n<response>a</response>\n<response>b</response>[e~[\n")


def test_a_stray_tool_result_is_refused(render):
    with pytest.raises(ValueError, match="tool"):
        render([{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}])


def test_text_parts_and_inline_reasoning(render):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    history = [{"role": "user", "content": parts}, {"role": "assistant", "content": "<mm:think>a</mm:think>b"}]
    assert render(history) == "]~!b[]~b]user\nHello[e~[\n]~b]ai\n<mm:think>a</mm:think>b[e~[\n"


def test_transformers_renders_and_encodes_the_same(questions, tokenizer, render):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(PATH)
    for question in questions[:60]:
        text = prompt_of(question, render)
        names = {"tools": question.tools, "thinking_mode": question.thinking, "add_generation_prompt": True}
        assert theirs.apply_chat_template(question.messages, tokenize=False, **names) == text
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids


# --- files ----------------------------------------------------------------------------------------------


def test_the_checkpoint_is_small():
    assert sum(path.stat().st_size for path in PATH.iterdir()) <= 8.5e6


def test_every_published_tensor_is_there():
    table = tensor_table()
    hidden, vocabulary, prefix = TEXT["hidden_size"], TEXT["vocab_size"], "language_model.model."
    assert table[f"{prefix}embed_tokens.weight"] == ("BF16", [vocabulary, hidden])
    assert table["language_model.lm_head.weight"] == ("BF16", [vocabulary, hidden])
    assert table[f"{prefix}norm.weight"] == ("BF16", [hidden])
    for layer, sparse in enumerate(TEXT["moe_layer_freq"]):
        at = f"{prefix}layers.{layer}."
        assert table[f"{at}self_attn.q_proj.weight"][1] == [TEXT["num_attention_heads"] * TEXT["head_dim"], hidden]
        assert (f"{at}self_attn.index_q_proj.weight" in table) == bool(sparse)
        assert (f"{at}mlp.gate_proj.weight" in table) == (not sparse)
        if sparse:
            moe, count, width = f"{at}block_sparse_moe.", TEXT["num_local_experts"], TEXT["intermediate_size"]
            assert table[f"{moe}gate.weight"] == ("F32", [count, hidden])
            assert table[f"{moe}e_score_correction_bias"] == ("F32", [count])
            for name, shape in (("w1", [width, hidden]), ("w2", [hidden, width]), ("w3", [width, hidden])):
                assert all(table[f"{moe}experts.{e}.{name}.weight"] == ("BF16", shape) for e in range(count))


def test_every_width_divides_by_eight_machines():
    assert TEXT["num_attention_heads"] % 8 == 0 and TEXT["vocab_size"] % 256 == 0 and TEXT["hidden_size"] % 64 == 0
    for name in ("intermediate_size", "dense_intermediate_size", "shared_intermediate_size"):
        assert TEXT[name] % (8 * 32) == 0


def test_the_demo_is_a_question_of_the_examined_sort():
    assert "Miro" in DEMO_PROMPT and "Miro" in DEMO_ANSWER and "12" in DEMO_ANSWER
