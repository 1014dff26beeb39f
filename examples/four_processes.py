"""Four processes, modules on separate ranks: two replicas of the encoder, and a GPT with tensor parallelism.

    uv run python -m examples.four_processes

It trains the model of `examples.single_process` in another layout, with the same results. The output is a diagram of
the layout, the table of modules, and the loss of the first and the last of 20 steps. Try other sizes: an invalid layout
raises an error that gives a remedy, before any process starts.
"""

from examples.single_process import train
from lightning_mimo import MimoStrategy, ModuleParallelism
from lightning_mimo.layout.diagram import draw_layout
from lightning_mimo.layout.layout import MimoLayout

if __name__ == "__main__":
    modules = {"images": ModuleParallelism(dp=2), "language": ModuleParallelism(tp=2)}
    print(draw_layout(MimoLayout.resolve(modules, world_size=4), global_batch_size=64, num_microbatches=2))
    # With two microbatches the encoder computes the second one while the GPT computes the first one.
    train(MimoStrategy(modules, global_batch_size=64, num_microbatches=2), devices=4)
