"""The Trainer with objectives, distillation, batching, checkpoints and several processes."""
