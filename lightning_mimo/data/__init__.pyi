from .chat.datamodule import ChatData as ChatData
from .chat.dataset import ChatDataset as ChatDataset
