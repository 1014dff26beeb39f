"""Two nodes with two processes each, started by torchrun: the layout and the results of `examples.four_processes`.

    uv run torchrun --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=NODE:29500 -m examples.torchrun

Run the command on both nodes, with the name of one of them as NODE. To try it on one machine, run it in two terminals
with NODE 127.0.0.1 and `--local-addr=127.0.0.1`. The numbers of nodes and ranks of torchrun and of the Trainer must
agree; otherwise a one-line error says which to change.
"""

from examples.single_process import train
from lightning_mimo import MimoStrategy, ModuleParallelism

if __name__ == "__main__":
    modules = {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}
    train(MimoStrategy(modules, global_batch_size=64, num_microbatches=2), devices=2, num_nodes=2)
