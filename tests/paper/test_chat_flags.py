"""`m3dist chat` on paper: its flags, and those that it hands on to the server that it starts."""

import sys

import pytest

from m3dist import chat, cli
from m3dist.options import ChatOptions


@pytest.fixture(autouse=True)
def called(monkeypatch):
    """Stands for the chat; holds what it was called with."""
    calls = []
    monkeypatch.setattr(chat, "main", lambda *args: calls.append(args) or 0)
    monkeypatch.delenv(cli.API_KEY, raising=False)
    return calls


def run(*argv: str) -> int:
    try:
        return cli.main(["chat", *argv])
    except SystemExit as exit:
        return exit.code


def test_nothing_said_is_a_server_of_its_own(called):
    assert run() == 0
    assert called == [(ChatOptions(), [])]


def test_every_flag_of_a_conversation_arrives(called, monkeypatch, tmp_path):
    monkeypatch.setenv(cli.API_KEY, "sk-1")
    flags = "--url https://mac1.local:8080/v1 --model m3 --thinking enabled --max-tokens 5 --temperature 0".split()
    assert run(*flags, "--system", "be brief") == 0
    [(options, serve)] = called
    assert serve == [] and vars(options) == {
        "url": "https://mac1.local:8080/v1", "api_key": "sk-1", "model": "m3", "system": "be brief",
        "thinking": "enabled", "max_tokens": 5, "temperature": 0.0,
    }  # fmt: skip


def test_what_the_server_is_started_with_is_what_serve_understands(called):
    words = (
        "--model owner/name --context 4096 --ranks 2 --backend mpi --experts whole --attention replicated "
        "--weights 2.0,1.0 --dtype float32 --prefill-chunk 8 --bits 4 --group-size 32 --mode affine --fetch"
    ).split()
    assert run(*words) == 0
    [(options, serve)] = called
    assert serve == words and options.model == "owner/name"
    assert vars(cli.build_parser().parse_args(["serve", *serve]))["weights"] == (2.0, 1.0)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--url mac1.local", "--url: must be an address such as http://127.0.0.1:8080"),
        ("--url http://a -n 2", "--ranks: not allowed with --url"),
        ("--url http://a --fetch", "--fetch: not allowed with --url"),
        ("--api-key abc", "--api-key: needs --url"),
        ("--model tiny --bits 4", "--bits: is for hub ids"),
        ("--temperature 3", "--temperature: must be from 0 to 2"),
        ("-n 2 --weights 1,2,3", "--weights: needs one number for each of the 2 ranks"),
        ("--hostfile nowhere.json", "nowhere.json"),
    ],
)
def test_flags_that_make_no_sense(called, capsys, flags, said):
    assert run(*flags.split()) == 2
    assert said in capsys.readouterr().err and not called


# ---------------------------------------------------------------------------------------------------------------------
# What is typed


@pytest.mark.parametrize(
    "typed, messages",
    [
        (["one", "", "  ", "two"], ["one", "two"]),
        (["one \\", "more", "two"], ["one \nmore", "two"]),
        (['"""', "a", "", "b", '"""', "c"], ["a\n\nb", "c"]),
        (['"""a', 'b"""'], ["a\nb"]),
        (['"""a"""', "c"], ["a", "c"]),
    ],
)
def test_a_message_has_as_many_lines_as_it_is_given(monkeypatch, typed, messages):
    lines = iter(typed)

    def read(prompt: str = "") -> str:
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(chat.select, "select", lambda *args: ([], [], []))  # nothing is pasted
    assert list(chat.messages(terminal=True)) == messages


def test_a_pasted_text_is_one_message(monkeypatch):
    """In a terminal that gives it line by line: more is there at once."""
    lines = ["one", "two", "three"]
    monkeypatch.setattr("builtins.input", lambda prompt="": lines.pop(0))
    monkeypatch.setattr(chat.select, "select", lambda *args: ([sys.stdin] * bool(lines), [], []))
    assert next(chat.messages(terminal=True)) == "one\ntwo\nthree"


def test_what_is_said_is_what_the_next_request_says():
    talk = chat.Conversation("m3", ChatOptions(system="be brief", temperature=0.0))
    talk.turns.append({"role": "user", "content": "hi"})
    body = talk.request()
    assert body["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert (body["temperature"], body["stream"]) == (0.0, True)
    assert not {"max_tokens", "chat_template_kwargs"} & body.keys()  # the server's own
    for line in ("/thinking disabled", "/system", "/clear"):
        assert chat.command(line, talk, chat.Console())
    assert talk.request()["chat_template_kwargs"] == {"thinking_mode": "disabled"} and not talk.request()["messages"]
    assert not chat.command("/exit", talk, chat.Console())
