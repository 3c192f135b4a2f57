"""`egmla` with accelerate's FSDP2 on CPU ranks, which accelerate itself shards on accelerators only.

Run by each rank, with accelerate's own environment variables of FSDP, and those of the rank and the address.
"""

import sys
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType


make_state = state.AcceleratorState.__init__


def make_sharded_state(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    make_state(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


if __name__ == "__main__":
    state.AcceleratorState.__init__ = make_sharded_state  # type: ignore[method-assign]

    from egmla.__main__ import main
    from egmla.training.trainer import DistillationTrainer

    train = DistillationTrainer.train

    def train_sharded(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = train(self, *args, **kwargs)
        kinds = {type(parameter).__name__ for parameter in self.model.parameters()}
        print(f"parameters are {', '.join(sorted(kinds))}", file=sys.stderr)
        return result

    DistillationTrainer.train = train_sharded  # type: ignore[method-assign]
    sys.exit(main())
