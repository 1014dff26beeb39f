"""Four processes, every module on its own: the encoder as two replicas, the GPT cut in two by tensor parallelism.

    uv run python -m examples.four_processes

What is trained is that of `examples.single_process`; only the layout is another, and the numbers are the same. You see
which module is on which rank, the table of modules, and the loss of the first and the last of 20 steps. Change the
sizes: what cannot run says why, before any process starts.
"""

from examples.single_process import train
from lightning_mimo import MimoStrategy, ModuleParallelism
from lightning_mimo.layout.diagram import draw_layout
from lightning_mimo.layout.layout import MimoLayout

if __name__ == "__main__":
    modules = {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}
    print(draw_layout(MimoLayout.resolve(modules, world_size=4), global_batch_size=64, num_microbatches=2))
    # Two microbatches, so that the encoder reads the second one's images while the GPT reads the first one's text.
    train(MimoStrategy(modules, global_batch_size=64, num_microbatches=2), devices=4)
