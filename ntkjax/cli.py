"""The command line: ``ntkjax COMMAND`` and flags. Its flags are the fields of the command's config.

Exit codes: 0 done, 1 done but for runs of a study that failed, 2 something the user can mend (printed in a line or two,
no traceback), 130 interrupted, 143 ended by SIGTERM.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

OUT_OF_MEMORY = "out of memory: lower --token-budget or --train.micro-batch-tokens, or use --remat"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse ``argv`` (default: the process's) and run the command; returns the exit code."""
    # transformers warns at import that there is no torch; nothing here wants it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import tyro

    from ntkjax.commands import COMMANDS, load_command
    from ntkjax.errors import ConfigError, UserError
    from ntkjax.job import barrier, is_primary, process, start
    from ntkjax.pipeline.alike import check_alike
    from ntkjax.pipeline.config_io import config_to_dict
    from ntkjax.pipeline.help import asks_for_help, help_config
    from ntkjax.pipeline.programs import keep_programs
    from ntkjax.pipeline.versions import library_versions
    from ntkjax.preemption import EXIT_CODE, Preempted, heeded

    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = {name: load_command(name) for name in COMMANDS}
    configs = {name: command.config for name, command in commands.items()}
    if asks_for_help(arguments):
        configs = {name: help_config(config, arguments) for name, config in configs.items()}
    code = 0
    try:
        config = tyro.extras.subcommand_cli_from_dict(
            configs,
            args=arguments,
            prog="ntkjax",
            description="Tangent-kernel data selection for language models.",
        )
        name, command = next((n, c) for n, c in commands.items() if type(config) is c.config)
        keep_programs()
        _, count = start()
        if count > 1:
            facts = {"version": library_versions(), "command": name, "flags": config_to_dict(config)}
            check_alike("flags or versions", facts, "Start the same command with the same packages on all of them.")
        model = getattr(config, "model", None)  # a study names it in its file
        meshed = command.spans and (model is None or model.mesh is not None)
        if count > 1 and not (command.divides or meshed):
            mesh = ", or give --mesh (such as --mesh auto) to run on the devices of all" if command.spans else ""
            raise ConfigError(f"{name} runs in one process, and this job has {count}; start one{mesh}")
        with heeded():
            text, code = command.from_command_line(config)
        barrier("end")  # whoever leaves first would end the others
        if is_primary():
            print(text)
    except UserError as error:
        return _fail(str(error))
    except MemoryError:
        return _fail(OUT_OF_MEMORY)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # so the runtime of a device says it, in a class of its own
            raise
        return _fail(f"{OUT_OF_MEMORY} ({str(error).splitlines()[0]})")
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            if error.filename is None:
                raise
            return _fail(f"{error.filename}: {error.strerror}; expected a path that can be used; check it")
        return _fail(f"{error.filename or 'a file'}: {error.strerror}. What was finished is kept; make room or choose "
                     "another --out, then run the same command again to go on.")  # fmt: skip
    except Preempted:
        print("\nended by SIGTERM; run the same command again to go on from what is finished", file=sys.stderr)
        if process()[1] > 1:
            # At the usual end jax waits for the other processes, some of which are in the middle of a product.
            sys.stderr.flush()
            os._exit(EXIT_CODE)
        return EXIT_CODE
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on from what is finished", file=sys.stderr)
        return 130
    return code


def _fail(message: str) -> int:
    print(f"ntkjax: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
