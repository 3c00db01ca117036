"""Min-K% Prob: was this text in the pretraining data of a language model?

  ./run.sh min_k_prob
  ./run.sh min_k_prob --config=:paper --config.model=/path/to/pythia-2.8b \\
    --config.data=file:WikiMIA_length64.jsonl

Expect, in the default preset: on models that were trained on half of the documents, the mean of the
least likely fifth of the tokens tells members from non-members better than perplexity, zlib and
lower-casing do, and better with longer texts, larger models, and more repetitions.

With --config.data=file:PATH a model of your own is asked: JSON lines with input and label (WikiMIA),
snippet, label and book (BookMIA), or text and date. AUC, TPR at low FPR for each length are printed,
scores.jsonl in the workdir has every text's scores.
"""

from ml_collections import ConfigDict

PRESETS = ("default", "tiny", "paper")


def get_config(preset: str = "default") -> ConfigDict:
  config = ConfigDict(
    {
      # Share of tokens of Min-K% Prob, and the shares of the sweep.
      "k": 0.2,
      "k_sweep": (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0),
      "bootstrap": 500,
      "seed": 0,
      # Detection in a file: file:PATH (empty trains models instead), and these three directories.
      "data": "",
      "model": "",
      "reference": "",  # Smaller model of the family; empty leaves Smaller Ref out.
      "masked_lm": "",  # BERT or RoBERTa with its head; empty leaves Neighbour out.
      "neighbours": 2,
      "neighbour_rate": 0.15,  # Share of tokens replaced.
      "bos": "tokenizer",  # As the tokenizer's template does, or yes, or no.
      "dtype": "float32",
      "batch_size": 4,
      "paraphrase": True,  # Also score the rule-based paraphrase.
      # Of dated documents: the split, the length in words, texts of each class (0: all there are).
      "members_before": "2017-01-01",
      "non_members_from": "2023-01-01",
      "lengths": (32, 64, 128),
      # What follows is of the trained models. Seeds draw members, data order and bootstrap.
      "seeds": (0, 1, 2),
      "domains": ("code", "prose"),
      "shifted_domain": "science",  # Non-members of the shifted benchmark.
      "tokenizer": "embedded-2048",
      "per_class": 40,  # Excerpts of each domain and class.
      "per_document": 2,
      "max_tokens": 512,  # Excerpts above are left out; also the rows of training.
      # Base models are trained once on other documents, so many of each domain.
      "base_documents": 120,
      "base_document_tokens": 600,
      "base_learning_rate": 5e-3,
      "train_batch": 2,
      # (width, layers), ascending; the reference is the first, the target the second.
      "sizes": ((32, 1), (64, 2), (96, 2)),
      "epochs": (1, 2, 4),  # Over the members; the second is the target's.
      "learning_rates": (3e-4, 1e-3, 3e-3),  # The second is the target's.
      "masked_lm_steps": 100,
      # Case studies.
      "contamination_strings": 40,  # For each number of occurrences; as many are never inserted.
      "occurrences": (1, 4),
      "corpus_tokens": (15_000, 45_000),
      "contamination_rates": (1e-3, 3e-3),
      "snippet_words": 32,
      # The book to unlearn: members of the first domain, learned so often, and gradient ascent.
      "book_chunks": 8,
      "book_epochs": 50,
      "unlearning_epochs": 10,  # At most.
      "unlearning_rate": 3e-4,
      "completion_tokens": 16,
      "prompt_tokens": 64,
    }
  )
  if preset == "tiny":
    config.seeds = (0,)
    config.bootstrap = 50
    config.tokenizer = "embedded-512"
    config.lengths = (8, 16, 32)
    config.snippet_words = 8
    config.per_class = 12
    config.max_tokens = 192
    config.base_documents = 12
    config.base_document_tokens = 200
    config.sizes = ((16, 1), (16, 1), (16, 1))
    config.k_sweep = (0.1, 0.2, 1.0)
    config.epochs = (1, 2, 3)
    config.masked_lm_steps = 4
    config.neighbours = 2
    config.contamination_strings = 6
    config.corpus_tokens = (600, 1200)
    config.book_chunks = 4
    config.book_epochs = config.unlearning_epochs = 1
    config.completion_tokens = 4
    config.prompt_tokens = 24
  if preset == "paper":
    config.data = "file:WikiMIA_length64.jsonl"
    config.model = "EleutherAI/pythia-2.8b"
    config.k_sweep = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0)
    config.dtype = "bfloat16"
    config.neighbours = 25
    config.lengths = (32, 64, 128, 256)
    config.paraphrase = False  # WikiMIA has files of paraphrases.
  return config
