"""Rewards: any callable, several with weights, networks, servers, people; and what happens when one of them fails."""

from fastppo.reward_models import AdapterReward, ModelReward
from fastppo.rewards.binding import RewardFunction
from fastppo.rewards.human import HumanReward
from fastppo.rewards.policy import Guarded, RewardPolicy, guard
from fastppo.rewards.reward import Reward
from fastppo.rewards.scores import is_listed, parse_scores
from fastppo.rewards.scoring import Problem, Scoring
from fastppo.rewards.url import RewardServerError, URLReward

__all__ = [
    "AdapterReward",
    "Guarded",
    "HumanReward",
    "ModelReward",
    "Problem",
    "Reward",
    "RewardFunction",
    "RewardPolicy",
    "RewardServerError",
    "Scoring",
    "URLReward",
    "guard",
    "is_listed",
    "parse_scores",
]
