"""What compression cost: perplexity, the paired comparison of a compressed model with its original, and ranking."""

from effjax.evaluate.loss import next_token_loss as next_token_loss
from effjax.evaluate.loss import next_token_nll as next_token_nll
from effjax.evaluate.paired import Comparison as Comparison
from effjax.evaluate.paired import Perplexity as Perplexity
from effjax.evaluate.paired import compare as compare
from effjax.evaluate.paired import compare_many as compare_many
from effjax.evaluate.paired import perplexity as perplexity
from effjax.evaluate.ranking import hit_rate_and_ndcg as hit_rate_and_ndcg
from effjax.evaluate.statistics import VERDICTS as VERDICTS
from effjax.evaluate.statistics import VerdictRule as VerdictRule
from effjax.evaluate.statistics import paired_bootstrap as paired_bootstrap
from effjax.evaluate.windows import windows_from_text as windows_from_text
