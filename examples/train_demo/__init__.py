"""Train the demo model: corpus, tasks, initial circuit, training loop, evaluation, model card."""
