"""The command line: ``ntkjax COMMAND`` and flags. One command is one stage; its flags are the fields of its config.

Exit codes: 0 done, 1 done but for runs of a study that failed, 2 something the user can mend (printed in a line or two,
no traceback), 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

DIVIDED = ("select",)
"""Commands whose work several processes divide (jax.distributed); the others run in one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse ``argv`` (default: the process's) and run the stage; returns the exit code."""
    # transformers warns at import that there is no torch; nothing here wants it.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import tyro

    from ntkjax.errors import ConfigError, UserError
    from ntkjax.parallel import barrier, is_primary, start
    from ntkjax.stages import COMMANDS

    configs = {name: command.config for name, command in COMMANDS.items()}
    code = 0
    try:
        config = tyro.extras.subcommand_cli_from_dict(
            configs,
            args=list(sys.argv[1:] if argv is None else argv),
            prog="ntkjax",
            description="Tangent-kernel data selection for language models.",
        )
        name, command = next((n, c) for n, c in COMMANDS.items() if type(config) is c.config)
        _, count = start()
        if count > 1 and name not in DIVIDED:
            raise ConfigError(f"{name} runs in one process, and this job has {count}; start one")
        text, code = command.run(config)
        barrier("end")  # whoever leaves first would end the others
        if is_primary():
            print(text)
    except UserError as error:
        return _fail(str(error))
    except MemoryError:
        return _fail("out of memory: lower --token-budget or --train.micro-batch-tokens, or use --remat")
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        return _fail(f"{error.filename or 'a file'}: {error.strerror}. What was finished is kept; make room or choose "
                     "another --out, then run the same command again to go on.")  # fmt: skip
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on from what is finished", file=sys.stderr)
        return 130
    return code


def _fail(message: str) -> int:
    print(f"ntkjax: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
