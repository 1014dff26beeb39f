"""Two nodes of two processes each, started by torchrun: the layout and the numbers of `examples.four_processes`.

    uv run torchrun --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=NODE:29500 -m examples.torchrun

Start it on both nodes, with the name of one of them for NODE; to try it, in two terminals of one machine, with NODE
127.0.0.1 and `--local-addr=127.0.0.1`. torchrun's numbers and the Trainer's must agree; where they do not, one line
says which to change.
"""

from examples.single_process import train
from lightning_mimo import MimoStrategy, ModuleParallelism

if __name__ == "__main__":
    modules = {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}
    train(MimoStrategy(modules, global_batch_size=64, num_microbatches=2), devices=2, num_nodes=2)
