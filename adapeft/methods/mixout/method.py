"""Mixout: everything, each weight mixed with its pretrained value."""

from adapeft.methods.base.rule_method import RuleMethod
from adapeft.methods.mixout.options import MixoutOptions, MixoutResetOptions
from adapeft.methods.mixout.rule import MixoutResetRule, MixoutRule


class Mixout(RuleMethod[MixoutOptions]):
    """Lee et al., "Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models", ICLR 2020."""

    options = MixoutOptions
    rule = MixoutRule
    family = "random"
    summary = "everything, inputs of linear layers mixed with the pretrained ones"
    source = "Lee et al. 2020"
    is_budgeted = False


class MixoutReset(RuleMethod[MixoutResetOptions]):
    """Mixout as Fu et al. 2023 compare it, p-sparse: all but a random draw is reset to be evaluated."""

    options = MixoutResetOptions
    rule = MixoutResetRule
    family = "random"
    summary = "mixout, of which a uniform draw of elements is kept"
    source = "Fu et al. 2023"
