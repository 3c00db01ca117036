"""In-context uncertainty: a Transformer that says the mean and the sd of the next label.

  ./run.sh icl_uncertainty
  ./run.sh icl_uncertainty --config=projects/icl_uncertainty/config.py:paper
  ./run.sh icl_uncertainty --config=:paper --compile_only=v5p:2x2x1

Expect, in the default preset: within 0.1 nats of Bayes late in the prompt, a sd that follows the
prompt's noise, unless the training had few tasks, and covariate shift mended by meta-training.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # The tasks: w ~ N(0, I), x ~ N(0, I), sigma by its prior.
      "dim": 2,
      "length": 16,  # T, labels in a training prompt.
      "noise": "uniform",  # On [noise_low, noise_high]; or "inverse_gamma", or "finite".
      "noise_low": 0.1,
      "noise_high": 1.0,
      "noise_values": (0.1, 0.4, 0.7, 1.0),  # Of "finite".
      "noise_shape": 3.0,  # Of "inverse_gamma", for sigma^2; w | sigma ~ N(0, sigma^2 I).
      "noise_scale": 0.5,
      # The Transformer.
      "hidden_size": 32,
      "num_layers": 3,
      "num_heads": 4,
      "merged_tokens": True,  # (x_t, x_{t-1}, y_{t-1}) in one token: half the length.
      "window": 0,  # S, tokens that a token sees; 0: all.
      # Training.
      "steps": 4000,
      "batch": 32,
      "learning_rate": 1.2e-2,
      "final_learning_rate": 2.4e-4,
      "warmup": 100,
      "b1": 0.95,
      "b2": 0.98,
      "weight_decay": 0.1,
      "chunk": 100,  # Steps between two looks at the loss.
      "seeds": 2,
      "seed": 0,
      # Models beside the one that is trained on fresh tasks.
      "pools": (8,),  # Sizes n of finite pools of tasks.
      "windows": (),  # Context windows S.
      "meta_scale": (0.5, 2.5),  # Of the covariates of the meta-trained model, one a prompt,
      "meta_shift": (0.0, 0.0),  # and the norm of their mean.
      "random_lengths": False,  # Also train on 1 ... longest labels.
      # Evaluation.
      "longest": 24,  # Labels in a test prompt.
      "test_prompts": 2000,  # For each seed.
      "grid": 200,  # Values of sigma in Bayes.
      "neighbours": 5,
      "shifted_noise": (1.2, 2.0),
      "shifted_weights": 2.0,
      "shifted_scale": 2.0,  # c of the covariates.
      "shifted_mean": 2.0,  # |mu| of the covariates.
    }
  )
  if preset == "tiny":
    config.length, config.longest = 9, 10
    config.hidden_size = 8
    config.num_layers = 1
    config.steps, config.warmup, config.chunk, config.batch = 20, 2, 10, 8
    config.test_prompts = 32
    config.grid = 8
  if preset == "paper":
    config.dim = 8
    config.length, config.longest = 100, 150
    config.hidden_size, config.num_layers, config.num_heads = 256, 12, 8
    config.merged_tokens = False
    config.steps, config.warmup, config.chunk, config.batch = 500_000, 5000, 500, 64
    config.learning_rate, config.final_learning_rate = 1e-4, 1e-5
    config.b1, config.b2, config.weight_decay = 0.9, 0.999, 0.0
    config.pools = tuple(2**i for i in range(0, 21, 2))
    config.windows = (20, 50)
    config.meta_shift = (0.0, 2.5)
    config.random_lengths = True
  return config
