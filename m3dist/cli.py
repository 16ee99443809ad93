"""The command line: `m3dist VERB ...`. No MLX; a verb's own module is imported when the verb is called.

Every value is checked here, before any process starts: a bad flag is one line that names it, and exit status 2.
"""

import argparse
import io
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from m3dist import __version__
from m3dist.cluster import environment
from m3dist.cluster.environment import Launch
from m3dist.cluster.hostfile import (
    BACKENDS,
    DESTINATION,
    PYTHON,
    PYTHONS,
    USER_VARIABLES,
    Host,
    Hostfile,
    local_hostfile,
    read_hostfile,
)
from m3dist.cluster.ssh import python_module
from m3dist.errors import CommunicationError, M3Error
from m3dist.machines import LINKS, MACS
from m3dist.options import (
    ATTENTION,
    CONNECTIONS,
    CPU_PREFILL_CHUNK,
    DTYPES,
    EXPERTS,
    GPU_PREFILL_CHUNK,
    MAX_RANKS,
    MODES,
    RANDOM,
    RANGE_SIZE,
    THINKING,
    BenchOptions,
    ChatOptions,
    ConvertOptions,
    FetchOptions,
    GenerateOptions,
    LinksOptions,
    ServeOptions,
    is_loopback,
)
from m3dist.watchdog import EXIT_PEER_LOST, START, bounds, seconds, within_bounds

if TYPE_CHECKING:
    from m3dist.cluster.supervise import Job

SECRETS = ("HF_TOKEN",)
API_KEY = "M3DIST_API_KEY"
# What the launcher waits for: the variable, its default and the least, in seconds. Hosts are asked for a word
# every two.
LIMITS = {
    "start_limit": START,
    "silence_limit": ("M3DIST_SILENCE_LIMIT", 10.0, 5.0),
    "end_limit": ("M3DIST_END_LIMIT", 60.0, 0.0),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status. Errors that m3dist raises on purpose are shown without a traceback."""
    prepare_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(argv)
    try:
        status = args.call(args, argv)
        sys.stdout.flush()
        return status
    except (M3Error, OSError) as error:
        print(f"m3dist {args.verb}: error: {error}", file=sys.stderr)
        if isinstance(error, OSError):  # standard output's, or no place for a temporary file
            drop_output()
        # A lost peer is not this rank's fault: the launcher looks on for the rank that failed first.
        return EXIT_PEER_LOST if isinstance(error, CommunicationError) else 2
    except ImportError as error:
        if "libmlx" not in str(error):
            raise
        advice = "pip install 'm3dist[cpu]', or 'm3dist[cuda]' for an NVIDIA GPU"
        print(f"m3dist: MLX has no backend here ({error}); {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def prepare_streams() -> None:
    """Standard streams that can be used whatever the caller did to them, here and in what we start."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:  # closed, as by `2>&-`: the next file opened would take its number
            setattr(sys, name, open(os.devnull, mode))
            with suppress(OSError):
                os.set_inheritable(number, True)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for what it lacks


def drop_output() -> None:
    """Let Python's exit, which flushes standard output, find nothing to complain about."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---------------------------------------------------------------------------------------------------------------------
# Verbs


def generate(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str]) -> int:
    """Be a rank if a launcher made this process one; else start -n of them; else do it all here."""
    check_kept(parser, args, args.model)
    if args.raw and args.system:
        parser.error("argument --system: not allowed with argument --raw, which gives the model --prompt alone")
    launch = environment.detect(os.environ)
    world = check_world(parser, args, launch)
    if args.prompt == "-" and launch.launcher == "mlx.launch":
        parser.error(
            "argument --prompt: - does not work under mlx.launch, which never passes on the end of standard input; "
            "give the text itself"
        )
    if launch.launcher == "single" and (world > 1 or args.hostfile):
        return start_ranks(parser, args, argv)
    watch_launcher()
    from m3dist.generate import main as generate_main

    return generate_main(generate_options(args), launch)


def bench(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str]) -> int:
    """As generate; first of all, what can be known to fail."""
    launch = environment.detect(os.environ)
    world = check_world(parser, args, launch)
    options = bench_options(args)
    check_kept(parser, args, args.model or "tiny")
    check_bench(parser, options, world)
    if launch.launcher == "single" and (world > 1 or args.hostfile):
        return start_ranks(parser, args, argv)
    watch_launcher()
    from m3dist.bench.program import main as bench_main

    return bench_main(options, launch)


def check_bench(parser: argparse.ArgumentParser, options: BenchOptions, world: int) -> None:
    """Whether the flags agree with each other, with the model and with what is installed; else ends the program."""
    if not options.random and (options.layers or options.set):
        flag = "--layers" if options.layers else "--set"
        parser.error(f"argument {flag}: needs --random: a checkpoint is measured as it is")
    if options.plot and not find_spec("matplotlib"):
        parser.error("argument --plot: needs matplotlib: pip install 'm3dist[plot]'")
    if options.plot and not os.path.isdir(os.path.dirname(options.plot) or "."):
        parser.error(f"argument --plot: {os.path.dirname(options.plot)} is no directory")
    if options.vs and not find_spec("mlx_lm"):
        parser.error("argument --vs: needs mlx-lm: pip install mlx-lm==0.32.2")
    from m3dist.bench.subject import check

    check(options, world)


def bench_links(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str]) -> int:
    """As bench, but nothing to measure for one rank. A flag before the word `links` is one of bench's."""
    if argv[1] != "links":
        parser.error(f"argument {argv[1]}: not allowed before links, whose flags come after it")
    launch = environment.detect(os.environ)
    world = check_world(parser, args, launch)
    if world == 1 and launch.world:
        parser.error("argument -n/--ranks: needs 2 or more, or a launcher that starts them: links are between ranks")
    if launch.launcher == "single":
        return start_ranks(parser, args, argv)
    watch_launcher()
    from m3dist.bench.links import main as links_main

    return links_main(LinksOptions(args.sizes, args.repeats, args.json), launch)


def start_ranks(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str]) -> int:
    """Run this command as the ranks that --hostfile or -n ask for."""
    from m3dist.cluster.supervise import run_job

    return run_job(job_of(parser, args, argv))


def job_of(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str]) -> "Job":
    """This command, run by the ranks that --hostfile or -n ask for."""
    from m3dist.cluster.supervise import Job

    return Job(
        hosts_of(parser, args),
        (None, *python_module("m3dist"), *argv),
        env=forwarded(),
        secret=SECRETS,
        ours=("stdin", "stdout", "stderr") if sys.stderr.isatty() else ("stdin", "stdout"),
        **limits(args),
    )


def serve(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str]) -> int:
    """Be a rank if a launcher made this process one; else start gateway and ranks, be they one, and watch over them."""
    check_kept(parser, args, args.model)
    launch = environment.detect(os.environ)
    check_world(parser, args, launch)
    options = serve_options(args)
    watch_launcher()
    from m3dist import serve as server

    if launch.launcher == "m3dist" and server.GATEWAY in os.environ:
        return server.rank_main(options, launch)
    keys = api_keys(parser, args)
    check_exposed(parser, options, keys)
    if launch.launcher != "single":
        return server.rank_main(options, launch, keys)
    if args.api_key:
        print("m3dist serve: --api-key is seen by all who list this machine's processes; --api-key-file and "
              f"{API_KEY} are not", file=sys.stderr)  # fmt: skip
    return server.main(options, job_of(parser, args, without_value(argv, "--api-key")), keys)


def chat(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str]) -> int:
    """Chat with the server at --url; or with one of its own, started with the flags that are serve's too."""
    flags = flags_given(args, parser, CHAT_SERVES)
    if args.url:
        if flags:
            parser.error(f"argument {flags[0]}: not allowed with --url, whose server was started with its own")
    else:
        if args.api_key or args.api_key_file:
            parser.error("argument --api-key: needs --url: the server that chat starts has a key of its own")
        check_kept(parser, args, args.model or "tiny")
        check_world(parser, args, environment.detect({}))
        flags = [*flags_given(args, parser, ("model",)), *flags]
    from m3dist.chat import main as chat_main

    values = {f.name: getattr(args, f.name) for f in fields(ChatOptions)}
    keys = api_keys(parser, args) if args.url else ()
    return chat_main(ChatOptions(**values | {"api_key": keys[0] if keys else None}), flags)


def flags_given(args: argparse.Namespace, parser: argparse.ArgumentParser, names: Sequence[str]) -> list[str]:
    """The words of the flags among `names` (of argparse's attributes) that have another value than their default."""
    words = []
    for name in names:
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if value != parser.get_default(name):
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [flag] if value is True else [flag, text]
    return words


def check_exposed(parser: argparse.ArgumentParser, options: ServeOptions, keys: Sequence[str]) -> None:
    """Whether a server that other machines can reach asks for a key; else ends the program."""
    if not (keys or options.insecure or is_loopback(options.host)):
        parser.error(
            f"argument --host: {options.host} can be reached from other machines: give --api-key-file (or {API_KEY}), "
            "or --insecure to let everybody in"
        )


def api_keys(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[str, ...]:
    """Those of --api-key, --api-key-file and the environment, out of which it is taken: no rank shall see it there."""
    sources = {"--api-key": args.api_key or [], API_KEY: [os.environ.pop(API_KEY)] if API_KEY in os.environ else []}
    if path := args.api_key_file:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            parser.error(f"argument --api-key-file: {path} cannot be read: {error}")
        sources["--api-key-file"] = [text for line in lines if (text := line.strip()) and not text.startswith("#")]
        if not sources["--api-key-file"]:
            parser.error(
                f"argument --api-key-file: no key in {path}; a line is one, unless it is empty or begins with #"
            )
    for source, keys in sources.items():
        if not all(re.fullmatch("[!-~]+", key) for key in keys):
            parser.error(
                f"argument {source}: a key is one or more of ASCII's letters, digits and signs, without blanks"
            )
    return tuple(dict.fromkeys(key for keys in sources.values() for key in keys))


def without_value(argv: Sequence[str], flag: str) -> list[str]:
    """`argv` without `flag` and its value, in either spelling."""
    kept, words = [], iter(argv)
    for word in words:
        if word == flag:
            next(words)
        elif not word.startswith(f"{flag}="):
            kept.append(word)
    return kept


def launch(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str]) -> int:
    """Run any command as ranks."""
    from m3dist.cluster.supervise import Job, run_again

    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("argument COMMAND: what to run, after --")
    started = environment.detect(os.environ)
    if started.launcher != "single":
        parser.error(f"{started.launcher} started this process as a rank already; run the command itself")
    hostfile = hosts_of(parser, args)
    job = Job(
        hostfile,
        tuple(command),
        env=forwarded() | dict(args.env),
        secret=set(SECRETS) - dict(args.env).keys(),
        marked=True,
        ours=("stdin",),
        reports=False,
        **limits(args),
    )
    return run_again(job, args.restart)


def hosts_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Hostfile:
    """What --hostfile, -n, --weights and --backend name; the ring where nothing else is said. Ends the program where
    the flags do not agree; raises HostfileError."""
    if args.hostfile and args.ranks:
        parser.error("argument -n/--ranks: not allowed with argument --hostfile, which says how many there are")
    if not args.hostfile:
        ranks = args.ranks or len(getattr(args, "weights", None) or "1")
        if ranks > MAX_RANKS:
            parser.error(f"argument --weights: {ranks} ranks; at most {MAX_RANKS} can share this model")
        return local_hostfile(ranks, args.backend or "ring")
    hostfile = read_hostfile(args.hostfile)
    backend = args.backend or hostfile.backend or "ring"
    return hostfile if backend == hostfile.backend else hostfile.with_backend(backend)


def limits(args: argparse.Namespace) -> dict[str, Any]:
    """LIMITS, each from its flag, where the verb has it, or its variable."""
    return {name: getattr(args, name, None) or seconds(*of) for name, of in LIMITS.items()}


def forwarded() -> dict[str, str]:
    """Variables of ours that every rank shall have: m3dist's settings, and what reaches the hub."""
    names = (*USER_VARIABLES, *SECRETS, "HF_ENDPOINT", "HF_HUB_OFFLINE")
    return {name: os.environ[name] for name in names if name in os.environ}


def watch_launcher() -> None:
    """End with the launcher, whatever ends it."""
    from m3dist.cluster import lifeline

    lifeline.watch()


def check_world(parser: argparse.ArgumentParser, args: argparse.Namespace, launch: Launch) -> int:
    """The number of ranks, if the flags agree with the launcher and with each other; else ends the program."""
    world = launch.world
    if launch.launcher == "single":
        world = hosts_of(parser, args).world
    elif args.ranks and world and args.ranks != world:
        parser.error(
            f"argument -n/--ranks: {launch.launcher} started {world} ranks, not {args.ranks}; "
            "leave -n out, the launcher decides"
        )
    if world and world > MAX_RANKS:
        parser.error(f"{launch.launcher} started {world} ranks; at most {MAX_RANKS} can share this model")
    if world and args.weights and len(args.weights) != world:
        parser.error(f"argument --weights: needs one number for each of the {world} ranks, not {len(args.weights)}")
    return world or 1


def generate_options(args: argparse.Namespace) -> GenerateOptions:
    values = {name: value for name, value in vars(args).items() if name in GenerateOptions.__dataclass_fields__}
    return GenerateOptions(**values | {"stop": tuple(args.stop or ())})


def serve_options(args: argparse.Namespace) -> ServeOptions:
    return ServeOptions(
        **{f.name: getattr(args, f.name) for f in fields(ServeOptions)} | {"names": tuple(args.names or ())}
    )


def fetch_options(args: argparse.Namespace) -> FetchOptions:
    return FetchOptions(**{f.name: getattr(args, f.name) for f in fields(FetchOptions)})


def bench_options(args: argparse.Namespace) -> BenchOptions:
    values = {name: value for name, value in vars(args).items() if name in BenchOptions.__dataclass_fields__}
    return BenchOptions(**values)


def plan(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str]) -> int:
    """Hand the checked flags to m3dist.plan_report, or with --predict to m3dist.predict_report."""
    if args.memory and args.machines:
        parser.error("argument --memory: not allowed with argument --machines, which already gives each one's memory")
    if args.predict:
        check_predict(parser, args)
        from m3dist.predict_report import main as predict_main

        return predict_main(args)
    for name in given(args, PREDICTION):
        parser.error(f"argument {name}: needs --predict")
    from m3dist.plan_report import main as plan_main

    return plan_main(args)


def doctor(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str]) -> int:
    """Ask the hosts that --hostfile or -n name; no rank is started."""
    hostfile = hosts_of(parser, args)
    if args.weights and len(args.weights) != hostfile.world:
        parser.error(f"argument --weights: needs one number for each of the {hostfile.world} ranks")
    from m3dist.doctor.program import main as doctor_main

    return doctor_main(args, hostfile)


def hostfile(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str]) -> int:
    """Write a hostfile for --hosts, or check one."""
    if args.check and (args.output or args.backend or args.python):
        parser.error("argument --check: not allowed with -o, --backend or --python, which are for --hosts")
    if args.python:
        args.hosts = tuple(host if host.local else replace(host, python=args.python) for host in args.hosts)
    from m3dist.doctor.hostfile_writer import main as hostfile_main

    return hostfile_main(args)


def check_kept(parser: argparse.ArgumentParser, args: argparse.Namespace, model: str) -> None:
    """Whether the flags of `add_kept` make sense for `model`; else ends the program."""
    from m3dist.checkpoint import local
    from m3dist.quantization import quantization_of

    quantization_of(args.mode, args.bits, args.group_size)
    for flag in (*given(args, ("bits", "group_size", "mode")), *(["--fetch"] if args.fetch else [])):
        if local(model) or getattr(args, "random", None):
            parser.error(f"argument {flag}: is for hub ids; a directory is loaded as it is (m3dist convert)")


def fetch(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str]) -> int:
    """As generate; or alone, what one rank of a world would keep."""
    if (args.world is None) != (args.rank is None):
        parser.error("argument --rank: needs --world, and --world needs --rank: one rank of so many, alone")
    if args.rank is not None and args.rank >= args.world:
        parser.error(f"argument --rank: must be from 0 to {args.world - 1} in a world of {args.world}")
    if args.world and (args.ranks or args.hostfile):
        parser.error("argument --world: not allowed with -n or --hostfile, which start all ranks")
    launch = environment.detect(os.environ)
    options = fetch_options(args)
    if args.world:
        if args.weights and len(args.weights) != args.world:
            parser.error(f"argument --weights: needs one number for each of the {args.world} ranks")
    else:
        world = check_world(parser, args, launch)
        if launch.launcher == "single" and (world > 1 or args.hostfile):
            return start_ranks(parser, args, argv)
    check_formats(args)
    watch_launcher()
    from m3dist.fetch.program import main as fetch_main

    return fetch_main(options, launch)


def convert(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str]) -> int:
    """Convert in this process."""
    check_formats(args)
    options = ConvertOptions(**{f.name: getattr(args, f.name) for f in fields(ConvertOptions)})
    from m3dist.fetch.convert import main as convert_main

    return convert_main(options)


def check_formats(args: argparse.Namespace) -> None:
    """Raises PlanError where the formats asked for are none, before anything is started."""
    from m3dist.quantization import recipe_of

    recipe_of(args.mode, args.bits, args.group_size, args.overrides)


def store(args: argparse.Namespace, argv: list[str]) -> int:
    """Look at this machine's store, or remove something of it."""
    from m3dist.fetch.store_program import main as store_main

    return store_main(args)


def check_predict(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Whether a prediction's flags agree with each other; else ends the program."""
    if args.machines:
        parser.error("argument --machines: not allowed with --predict, which is for equal machines: --world, --memory")
    if args.attention != ATTENTION[0]:
        parser.error("argument --attention: not allowed with --predict, which compares both")
    if args.from_bench and args.mac:
        parser.error("argument --mac: not allowed with --from-bench, which says what the machine does")
    for name in given(args, ("latency", "link_bandwidth")):
        if not (args.link or args.from_bench):
            parser.error(f"argument {name}: needs --link, which of them it is")


def given(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """The flags among `names` (of argparse's attributes, None by default) that were given."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]


# ---------------------------------------------------------------------------------------------------------------------
# Flags


class Parser(argparse.ArgumentParser):
    """argparse without guessing (`--temp` is an error, not `--temperature`) and with short errors."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n({self.prog} --help shows the flags)\n")


def build_parser() -> Parser:
    parser = Parser(prog="m3dist", description="MiniMax-M3, split over several machines with MLX.")
    parser.add_argument("--version", action="version", version=f"m3dist {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    add_generate(verbs.add_parser("generate", help="answer one prompt"))
    add_serve(verbs.add_parser("serve", help="answer many people, over HTTP, as OpenAI's and Anthropic's servers do"))
    add_chat(verbs.add_parser("chat", help="talk in the terminal, to a server or to a cluster that it starts"))
    add_plan(verbs.add_parser("plan", help="what each machine would hold and read"))
    add_launch(verbs.add_parser("launch", help="run a command as ranks, on this machine or those of a hostfile"))
    add_doctor(verbs.add_parser("doctor", help="ask every host what would keep a job from running, and what to do"))
    add_hostfile(verbs.add_parser("hostfile", help="write a hostfile from what the hosts have, or check one"))
    add_bench(verbs.add_parser("bench", help="measure speed and memory here, and compare with mlx-lm"))
    add_fetch(verbs.add_parser("fetch", help="get what each rank needs of a checkpoint, and keep it"))
    add_convert(verbs.add_parser("convert", help="a checkpoint in other formats, which mlx-lm reads too"))
    add_store(verbs.add_parser("store", help="what this machine keeps of checkpoints: list, verify, remove"))
    return parser


def add(group: Any, *flags: str, default: Any = None, help: str, **kwargs: Any) -> None:
    """A flag whose help ends with its default, where it has one."""
    suffix = f" (default: {default})" if default is not None and default != () else ""
    group.add_argument(*flags, default=default, help=help + suffix, **kwargs)


# A flag takes a line or two.
# fmt: off


def add_generate(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Answer one prompt: in this process, in -n processes on this machine, or as a rank of mlx.launch or mpirun."
    )
    parser.set_defaults(call=partial(generate, parser))
    preset = GenerateOptions(prompt="")

    text = parser.add_argument_group("text")
    add(text, "--model", metavar="DIR|HUB_ID|tiny", type=nonempty, default=preset.model,
        help="checkpoint directory, hub id, or tiny: the one inside the package")
    add(text, "--prompt", metavar="TEXT", type=nonempty, required=True, help="what to answer; - reads standard input")
    add(text, "--system", metavar="TEXT", type=unicode, help="system message")
    add(text, "--thinking", choices=THINKING, default=preset.thinking, help="whether the model reasons first")
    text.add_argument("--raw", action="store_true", help="no chat template: continue the prompt as it is")
    text.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")

    sampling = parser.add_argument_group("sampling")
    add(sampling, "--max-tokens", metavar="N", type=whole(1), default=preset.max_tokens, help="longest answer")
    add(sampling, "--temperature", metavar="T", type=real("0 or more", lambda x: x >= 0), default=preset.temperature,
        help="0 always takes the likeliest token")
    add(sampling, "--top-p", metavar="P", type=real("more than 0 and at most 1", lambda x: 0 < x <= 1),
        default=preset.top_p, help="the likeliest tokens that together reach this probability; 1 is off")
    add(sampling, "--top-k", metavar="K", type=whole(0), default=preset.top_k, help="the K likeliest tokens; 0 is off")
    add(sampling, "--min-p", metavar="P", type=real("from 0 to 1", lambda x: 0 <= x <= 1), default=preset.min_p,
        help="tokens at least this likely, relative to the likeliest; 0 is off")
    add(sampling, "--seed", metavar="N", type=whole(0, 2**64 - 1), help="the same seed gives the same answer")
    add(sampling, "--stop", metavar="TEXT", type=nonempty, action="append", help="end before TEXT; repeatable")

    add_prefill_chunk(add_cut(parser, preset))
    add_kept(parser)


def add_prefill_chunk(group: Any) -> None:
    add(group, "--prefill-chunk", metavar="N", type=whole(1),
        help=f"tokens of the prompt computed at a time; default: {GPU_PREFILL_CHUNK} on a GPU, {CPU_PREFILL_CHUNK} on "
        "the CPU")


def add_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Serve a model over HTTP: OpenAI's chat/completions, completions and responses, Anthropic's messages, under "
        "/v1; /health; /metrics. Ranks that fail are started again, and the requests go on where they were. SIGTERM or "
        "Ctrl-C: finish what runs, then end."
    )
    parser.set_defaults(call=partial(serve, parser))
    preset = ServeOptions()

    model = parser.add_argument_group("model")
    add(model, "--model", metavar="DIR|HUB_ID|tiny", type=nonempty, default=preset.model,
        help="checkpoint directory, hub id, or tiny: the one inside the package")
    add(model, "--name", dest="names", metavar="NAME", type=nonempty, action="append",
        help="what clients may call the model, beside --model's value; repeatable")
    add(model, "--thinking", choices=THINKING, default=preset.thinking,
        help="whether the model reasons first, where a request does not say")

    access = parser.add_argument_group("access")
    add(access, "--host", metavar="ADDRESS", type=nonempty, default=preset.host,
        help="where to listen; 0.0.0.0 for all who reach this machine, which needs a key")
    add(access, "--port", metavar="N", type=whole(0, 65535), default=preset.port, help="0: one that is free")
    add_keys(access)
    access.add_argument("--insecure", action="store_true", help="let other machines in without a key")

    limits = parser.add_argument_group("limits")
    add(limits, "--rows", metavar="N", type=whole(1, 4096), default=preset.rows,
        help="requests computed together, at most")
    add(limits, "--queue", metavar="N", type=whole(0), default=preset.queue,
        help="requests that may wait; beyond, clients are told to come again (429)")
    add(limits, "--context", metavar="N", type=whole(1),
        help="tokens of one prompt and its answer; default: the model's, as far as memory goes")
    add(limits, "--cache-tokens", metavar="N", type=whole(1),
        help="tokens that caches hold, of all requests together; default: as many as memory takes")
    add(limits, "--request-limit", metavar="SECONDS", type=positive, default=preset.request_limit,
        help="that a request may take in all")
    add(limits, "--restarts", metavar="N", type=whole(0), default=preset.restarts,
        help="starts of the ranks after failures in a row, after 0, 1, 2, 4, ... s, before giving up")
    add(limits, "--drain", metavar="SECONDS", type=real("from 0 to 1e6", lambda x: 0 <= x <= 1e6), default=preset.drain,
        help="that running requests may take to finish when the server is to end")
    add_prefill_chunk(add_cut(parser, preset))
    add_kept(parser)


# Those of serve's flags that chat has for the server that it starts.
CHAT_SERVES = ("context", "ranks", "hostfile", "backend", "experts", "attention", "weights", "dtype", "prefill_chunk",
               "bits", "group_size", "mode", "fetch")  # fmt: skip


def add_chat(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Talk to a model: at the server that --url names, or in a server that is started for this chat and ends with "
        "it. /help shows what can be typed. Without a terminal, every line of standard input is a message."
    )
    parser.set_defaults(call=partial(chat, parser))
    add(parser, "--model", metavar="NAME", type=nonempty,
        help="as serve's; with --url, which of the server's models (default: its first)")

    talk = parser.add_argument_group("conversation")
    add(talk, "--system", metavar="TEXT", type=unicode, help="system message")
    add(talk, "--thinking", choices=THINKING, help="whether the model reasons first (default: the server's)")
    add(talk, "--max-tokens", metavar="N", type=whole(1), help="longest answer (default: the server's)")
    add(talk, "--temperature", metavar="T", type=real("from 0 to 2", lambda x: 0 <= x <= 2),
        help="0 always takes the likeliest token (default: the server's)")

    server = parser.add_argument_group("a server that runs")
    add(server, "--url", metavar="URL", type=url, help="its address, such as http://127.0.0.1:8080")
    add_keys(server)

    cut = add_cut(parser, ServeOptions())
    add_prefill_chunk(cut)
    add(cut, "--context", metavar="N", type=whole(1), help="tokens of the whole chat, at most")
    add_kept(parser)


def add_keys(group: Any) -> None:
    group.add_argument("--api-key", metavar="KEY", type=nonempty, action="append",
        help=f"a key, which others on this machine can see; better --api-key-file, or {API_KEY}")
    add(group, "--api-key-file", metavar="FILE", type=nonempty, help="a file with a key in each line")


def add_ranks(group: Any) -> None:
    add(group, "-n", "--ranks", metavar="N", type=whole(1, MAX_RANKS),
        help="processes to start on this machine (mlx.launch and mpirun set their number themselves)")
    add(group, "--hostfile", metavar="FILE", type=nonempty,
        help="the machines to start ranks on, over ssh (hostfiles/README.md)")
    add(group, "--backend", choices=BACKENDS,
        help="what the ranks talk over; default: what the hostfile names, or ring")


def add_shares(cut: Any, preset: GenerateOptions | BenchOptions | FetchOptions | ServeOptions) -> None:
    add(cut, "--experts", choices=EXPERTS, default=preset.experts,
        help="cut each routed expert by columns, or give each rank whole experts")
    add(cut, "--attention", choices=ATTENTION, default=preset.attention,
        help="share the heads out, or give each rank all of them: a sum a layer less, for more memory; equal machines")
    add(cut, "--weights", metavar="W,W,...", type=positives, help="each rank's share of the work, such as 2,1,1")


def add_cut(parser: argparse.ArgumentParser, preset: GenerateOptions | BenchOptions | ServeOptions) -> Any:
    """The group of flags that say how many ranks there are and what each holds."""
    cut = parser.add_argument_group("the cut")
    add_ranks(cut)
    add_shares(cut, preset)
    add(cut, "--dtype", choices=DTYPES,
        help="of activations and unquantised weights; default: bfloat16 on a GPU, float32 on the CPU")
    return cut


def add_launch(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run COMMAND once a rank, here or on the machines of a hostfile; watch it, and end all ranks when one fails."
    )
    parser.usage = "%(prog)s [--hostfile FILE | -n N] [FLAG ...] -- COMMAND ..."
    parser.set_defaults(call=partial(launch, parser))
    add_ranks(parser)
    add(parser, "--restart", metavar="N", type=whole(0), default=0,
        help="start again at most N times after a failure, after 1, 2, 4, ... s")
    add(parser, "--start-limit", metavar="SECONDS", type=limit("start_limit"),
        help="until every host must have answered and every rank that reports must have come up; default: "
        "M3DIST_START_LIMIT, or 60")
    add(parser, "--silence-limit", metavar="SECONDS", type=limit("silence_limit"),
        help="without a word from a host, until it counts as lost; default: M3DIST_SILENCE_LIMIT, or 10")
    add(parser, "--end-limit", metavar="SECONDS", type=limit("end_limit"),
        help="that ranks may go on after another has ended with status 0; default: M3DIST_END_LIMIT, or 60")
    parser.add_argument("--env", metavar="NAME[=VALUE]", type=variable, action="append", default=[],
        help="set for every rank; without a value, to ours; repeatable")
    parser.add_argument("command", metavar="COMMAND", nargs=argparse.REMAINDER,
        help="`python` and `m3dist` are each host's own (the hostfile's `python`)")


def add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Ask every host of a hostfile, in parallel and within 30 s, and try the links between them. Starts no rank. "
        "Exit status: 0 if a launch would work, 1 if not, 2 for wrong input."
    )
    parser.set_defaults(call=partial(doctor, parser))
    add_ranks(parser)
    add(parser, "--model", metavar="DIR|HUB_ID|tiny", type=nonempty,
        help="compare memory and disk with what this model needs; see m3dist plan")
    add(parser, "--context", metavar="N", type=whole(1), help="with --model: tokens of context to make room for")
    add(parser, "--experts", choices=EXPERTS, default=EXPERTS[0], help="with --model: how the experts are cut")
    add(parser, "--attention", choices=ATTENTION, default=ATTENTION[0], help="with --model: how the attention is cut")
    add(parser, "--weights", metavar="W,W,...", type=positives, help="with --model: each rank's share of the work")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with the evidence")


def add_hostfile(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a hostfile from the addresses, cables and RDMA devices that some hosts have, after trying its links; or "
        "say what of one no longer holds. Exit status: 0 if it is written, or holds; 1 if not; 2 for wrong input."
    )
    parser.set_defaults(call=partial(hostfile, parser))
    what = parser.add_mutually_exclusive_group(required=True)
    add(what, "--hosts", metavar="HOST,HOST,...", type=host_names,
        help="names that ssh knows, such as mac1.local or me@mac1.local; 127.0.0.1 is this machine")
    add(what, "--check", metavar="FILE", type=nonempty, help="a hostfile; m3dist doctor measures its links too")
    add(parser, "--backend", choices=BACKENDS[:-1], help="default: the fastest of jaccl, jaccl-ring and ring")
    add(parser, "--python", metavar="PATH", type=interpreter,
        help="which has m3dist on those hosts, such as '~/venv/bin/python' (in quotes); default: the path of this one")
    add(parser, "-o", "--output", metavar="FILE", type=nonempty, help="where to write; default: standard output")


def add_bench(parser: argparse.ArgumentParser) -> None:
    parser.description = "Measure prefill and decode here, on any launcher: where the time goes, and how mlx-lm does."
    parser.set_defaults(call=partial(bench, parser))
    preset = BenchOptions()

    model = parser.add_argument_group("model")
    add(model, "--model", metavar="DIR|HUB_ID|tiny", type=nonempty,
        help="checkpoint to load (default: tiny); with --random the one whose config is taken (default: MiniMax-M3)")
    add(model, "--random", choices=RANDOM, metavar="FORMAT",
        help=f"no checkpoint: random weights in one of {', '.join(RANDOM)}")
    add(model, "--layers", metavar="N", type=whole(1), help="with --random: the model's first N layers only")
    add(model, "--set", metavar="FIELD=VALUE,...", type=settings, default=(),
        help="with --random: other numbers than the config's, such as hidden_size=1024,moe_layer_freq=0111")

    runs = parser.add_argument_group("runs")
    add(runs, "--decode", metavar="N,N,...", type=counts,
        help="contexts to decode at; default: 512,16384,32768, as far as the model goes")
    add(runs, "--prefill", metavar="N,N,...", type=counts,
        help="prompts to prefill; default: 2048,8192, as far as the model goes")
    add(runs, "--chunk-at", metavar="N,N,...", type=counts, default=(), help="depths at which to prefill one chunk")
    add(runs, "--chunk", metavar="N", type=whole(1), default=preset.chunk, help="tokens of the chunk at --chunk-at")
    add_prefill_chunk(runs)
    add(runs, "--tokens", metavar="N", type=whole(1), default=preset.tokens, help="tokens of a decode run")
    add(runs, "--repeats", metavar="N", type=whole(1), default=preset.repeats, help="runs for each figure")
    add(runs, "--vs", choices=("mlx-lm",), help="also run mlx-lm's model, on the same weights, in turn with ours")
    runs.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    add(runs, "--plot", metavar="FILE", type=nonempty, help="draw decode against context, as FILE.png or .svg")

    add_cut(parser, preset)
    add_kept(parser)
    others = parser.add_subparsers(title="instead of a model", metavar="WHAT")
    add_links(others.add_parser("links", help="time and check sums and gathers between ranks; has flags of its own"))
    parser.usage = "%(prog)s [FLAG ...]\n       %(prog)s links [FLAG ...]"  # argparse would say that WHAT is needed


def add_links(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time sums and gathers between the ranks by size, on any launcher, and check that they are right. No model."
    )
    parser.set_defaults(call=partial(bench_links, parser))
    preset = LinksOptions()
    add_ranks(parser)
    parser.add_argument("--sizes", metavar="SIZE,SIZE,...", type=sizes, default=preset.sizes,
        help="what each rank gives, in bytes or as 12KiB or 1MiB; default: 4 to 16MiB by fours, and 12KiB, "
        "which MiniMax-M3 sums in decode")
    add(parser, "--repeats", metavar="N", type=whole(1), default=preset.repeats,
        help="runs for each figure; of slow ones fewer")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def add_formats(parser: argparse.ArgumentParser, title: str) -> Any:
    formats = parser.add_argument_group(title)
    add(formats, "--bits", metavar="N", type=whole(2, 8), help="bits of a weight (3, 4, 5, 6 or 8)")
    add(formats, "--group-size", metavar="N", type=whole(16), help="weights that share one scale (32, 64 or 128)")
    add(formats, "--mode", choices=MODES, help="affine, where only --bits is given")
    return formats


def add_kept(parser: argparse.ArgumentParser) -> None:
    """The flags of who loads what a store keeps."""
    kept = add_formats(parser, "of a hub id: which of those that are kept (m3dist store ls)")
    kept.add_argument("--fetch", action="store_true", help="get what is missing first, as m3dist fetch does")


def add_conversion(parser: argparse.ArgumentParser) -> None:
    """The flags of what is got from the hub and made of it."""
    formats = add_formats(parser, "formats, if not the checkpoint's own")
    add(formats, "--overrides", metavar="FILE", type=nonempty,
        help='YAML, other formats for some modules: \'"*.self_attn.*": {bits: 8}\' or \'"*lm_head": false\'; the last '
        "match counts")
    hub = parser.add_argument_group("the hub")
    add(hub, "--connections", metavar="N", type=whole(1, 64), default=CONNECTIONS, help="ranges asked for at a time")
    hub.add_argument("--range-size", metavar="SIZE", type=size, default=RANGE_SIZE,
        help="bytes of one range, as 512KiB or 16MiB: as much is fetched again after an interruption, for each "
        "connection (default: 16MiB)")


def add_fetch(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Get from the hub, or from a directory, what each rank needs of a checkpoint, and keep it in the rank's store "
        "(M3DIST_STORE, or ~/.cache/m3dist/store). Each byte crosses the internet once; what several ranks need, they "
        "exchange. Goes on where it was interrupted, and fetches anew what is damaged."
    )
    parser.set_defaults(call=partial(fetch, parser))
    preset = FetchOptions("")
    parser.add_argument("model", metavar="HUB_ID|DIR", type=nonempty, help="owner/name[@revision], or a directory")
    cut = parser.add_argument_group("the cut")
    add_ranks(cut)
    add(cut, "--world", metavar="N", type=whole(1, MAX_RANKS), help="with --rank: without the others, who are N in all")
    add(cut, "--rank", metavar="R", type=whole(0, MAX_RANKS - 1), help="with --world: what rank R needs, here")
    add_shares(cut, preset)
    add_conversion(parser)


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write a checkpoint from the hub or a directory in other formats, as mlx-lm and m3dist read it; block by "
        "block, whatever its size. Goes on where it was interrupted."
    )
    parser.set_defaults(call=partial(convert, parser))
    parser.add_argument("model", metavar="HUB_ID|DIR", type=nonempty, help="owner/name[@revision], or a directory")
    parser.add_argument("out", metavar="OUT", type=nonempty, help="directory to write; must not be there yet")
    add_conversion(parser)


def add_store(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "What m3dist fetch has kept on this machine, in M3DIST_STORE or ~/.cache/m3dist/store. Exit status: 1 if "
        "something is not intact, 2 for wrong input."
    )
    parser.set_defaults(call=store)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    ls = actions.add_parser("ls", help="what is kept, for which plan, how large; a look at sizes and headers")
    ls.add_argument("--json", action="store_true", help="print one JSON object, with the directories")
    verify = actions.add_parser("verify", help="read everything and compare checksums")
    verify.add_argument("model", metavar="MODEL", nargs="?", type=nonempty, help="a hub id or directory; default: all")
    rm = actions.add_parser("rm", help="remove what is kept of a model, finished or not")
    rm.add_argument("what", metavar="MODEL|PATH", type=nonempty, help="as fetch had it, or a directory of the store")
    rm.add_argument("--unfinished", action="store_true", help="only what interrupted fetches left")
    rm.add_argument("--yes", action="store_true", help="do not ask")


def add_plan(parser: argparse.ArgumentParser) -> None:
    parser.description = "What each machine would hold and read. Loads no weights."
    parser.set_defaults(call=partial(plan, parser))
    add = parser.add_argument
    add("--model", metavar="ID_OR_DIR", type=nonempty, default="MiniMaxAI/MiniMax-M3",
        help="hub id or directory (default: %(default)s)")
    add("--experts", choices=EXPERTS, default=EXPERTS[0],
        help="cut each routed expert by columns, or give each rank whole experts (default: %(default)s)")
    add("--attention", choices=ATTENTION, default=ATTENTION[0],
        help="share the heads out, or give each rank all of them (default: %(default)s)")
    add("--context", metavar="N", type=whole(1), help="tokens of context to make room for")
    add("--json", action="store_true", help="print one JSON object")

    machines = parser.add_mutually_exclusive_group()
    machines.add_argument("--world", metavar="N", type=whole(1, MAX_RANKS), help="number of equal machines")
    machines.add_argument("--machines", metavar="GB,GB,...", type=machine_memories, help="each machine's memory, in GB")
    add("--memory", metavar="GB", type=positive, help="memory of each of the --world machines")

    add_predict(parser)
    add = parser.add_argument_group("quantisation, if not the checkpoint's own").add_argument
    add("--mode", choices=MODES, help="format of the quantised weights")
    add("--bits", metavar="N", type=whole(2, 8), help="bits of one quantised weight")
    add("--group-size", metavar="N", type=whole(16), help="weights that share one scale")


PREDICTION = ("mac", "link", "prompt_tokens", "prefill_chunk", "from_bench",
              "bandwidth", "flops", "launch", "latency", "link_bandwidth")  # fmt: skip


def add_predict(parser: argparse.ArgumentParser) -> None:
    """The flags of `plan --predict`. Their defaults are predict_report's, so that one given without it is noticed."""
    add = parser.add_argument_group("prediction of speed").add_argument
    add("--predict", action="store_true", help="tokens per second on 1, 2, 4 and 8 Macs, or on --world")
    add("--mac", choices=MACS, help="which Mac (default: m3-ultra)")
    add("--link", choices=LINKS, help="how they are connected (default: every way in turn)")
    add("--prompt-tokens", metavar="N", type=whole(1), help="prompt that is prefilled (default: 8192)")
    add("--prefill-chunk", metavar="N", type=whole(1),
        help=f"tokens of it computed at a time (default: {GPU_PREFILL_CHUNK}, or the bench's)")
    add("--from-bench", metavar="FILE", type=nonempty,
        help="what m3dist bench --json measured, instead of a Mac; also checks the prediction against it")
    add("--bandwidth", metavar="GB/S", type=positive, help="memory bandwidth that reading weights reaches")
    add("--flops", metavar="TFLOP/S", type=positive, help="arithmetic that products with many rows reach")
    add("--launch", metavar="US", type=positive, help="time a small kernel takes")
    add("--latency", metavar="US", type=positive, help="time of a sum of one token's hidden state over two ranks")
    add("--link-bandwidth", metavar="GB/S", type=positive, help="what a rank sends over --link")


# fmt: on
# ---------------------------------------------------------------------------------------------------------------------
# Values: argparse types. argparse puts the flag's name before their errors.


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """A whole number from `low` to `high`, both included."""
    described = f"{low} or more" if high is None else f"from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"must be {described}, not {value}")
        return value

    return parse


def real(described: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    """A finite number for which `allowed` holds; `described` says in words which those are."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None
        if not math.isfinite(value) or not allowed(value):
            raise argparse.ArgumentTypeError(f"must be {described}, not {text}")
        return value

    return parse


def limit(name: str) -> Callable[[str], float]:
    """A flag's number of seconds, as one of LIMITS."""
    *_, least = LIMITS[name]
    return real(bounds(least), lambda x: within_bounds(x, least))


def counts(text: str) -> tuple[int, ...]:
    """Comma-separated whole numbers, 1 or more; or the word none, for no number at all."""
    return () if text == "none" else tuple(whole(1)(part) for part in text.split(","))


def sizes(text: str) -> tuple[int, ...]:
    """Comma-separated sizes in bytes, KiB or MiB: multiples of 4 bytes, whole values of every dtype, up to 256 MiB."""
    return tuple(size(part) for part in text.split(","))


def size(text: str) -> int:
    """One of `sizes`."""
    match = re.fullmatch(r"([0-9]{1,9})(B|KiB|MiB)?", text)
    count = int(match[1]) * {"KiB": 2**10, "MiB": 2**20}.get(match[2], 1) if match else 0
    if not 4 <= count <= 2**28 or count % 4:
        raise argparse.ArgumentTypeError(f"must be a multiple of 4 up to 256MiB, such as 12KiB, not {text!r}")
    return count


def variable(text: str) -> tuple[str, str]:
    """NAME=VALUE, or NAME for a variable of ours."""
    name, equals, value = text.partition("=")
    if not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE or NAME, not {text!r}")
    if not equals and name not in os.environ:
        raise argparse.ArgumentTypeError(f"{name} is not set here; give it a value: {name}=...")
    return name, value if equals else os.environ[name]


def settings(text: str) -> tuple[tuple[str, str], ...]:
    """Comma-separated FIELD=VALUE."""
    pairs = tuple(part.partition("=") for part in text.split(","))
    if bad := [name for name, equals, value in pairs if not (name and equals and value)]:
        raise argparse.ArgumentTypeError(f"must be FIELD=VALUE, not {bad[0]!r}")
    return tuple((name, value) for name, _, value in pairs)


positive = real("from 1e-6 to 1e6", lambda x: 1e-6 <= x <= 1e6)  # sums and ratios of such numbers stay finite


def positives(text: str) -> tuple[float, ...]:
    """Comma-separated numbers above 0."""
    return tuple(positive(part) for part in text.split(","))


def machine_memories(text: str) -> tuple[float, ...]:
    """Comma-separated memories in GB, one a machine."""
    memories = positives(text)
    if len(memories) > MAX_RANKS:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_RANKS} machines, not {len(memories)}")
    return memories


def host_names(text: str) -> tuple[Host, ...]:
    """Comma-separated names for ssh."""
    found = []
    for name in text.split(","):
        if not DESTINATION.fullmatch(name) or not name.isprintable():
            raise argparse.ArgumentTypeError(f"must be names that ssh knows, such as mac1.local, not {name!r}")
        user, _, ssh = name.rpartition("@")
        found.append(Host(ssh, user=user or None))
        if user and found[-1].local:
            what = f"{name!r} names a user for ssh, and {ssh} means this machine, without ssh; leave the user out"
            raise argparse.ArgumentTypeError(what)
    if len(found) > MAX_RANKS:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_RANKS} hosts, not {len(found)}")
    return tuple(found)


def interpreter(text: str) -> str:
    """A host's Python, as a hostfile's `python`."""
    if not PYTHON.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be {PYTHONS}, not {text!r}")
    return unicode(text)


def url(text: str) -> str:
    """Of a server."""
    if not re.fullmatch(r"https?://[^\s/]+\S*", text):
        raise argparse.ArgumentTypeError(f"must be an address such as http://127.0.0.1:8080, not {text!r}")
    return text


def unicode(text: str) -> str:
    """Text without what Python makes of bytes that are none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("must be text, in UTF-8") from None
    return text


def nonempty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return unicode(text)
