"""``python -m qbb_export MODEL -o model.onnx``: what ``qbb-export`` does, for launchers of several processes.

    torchrun --nproc_per_node=2 -m -- qbb_export MODEL -o model.onnx --start gptq

Without the ``--`` torchrun takes ``--start`` for an option of its own.
"""

from __future__ import annotations

import os
import sys

from qbb_export.cli import export_main

if __name__ == "__main__":
    code = export_main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from qbb_export.distill.ranks import end_process

        end_process(code)
    sys.exit(code)
