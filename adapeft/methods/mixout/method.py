"""Mixout: all candidates, with trained weights randomly replaced by their pretrained values."""

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
    """Mixout as in the comparison of Fu et al. 2023, p-sparse: all except a random draw is reset for evaluation."""

    options = MixoutResetOptions
    rule = MixoutResetRule
    family = "random"
    summary = "mixout, of which a uniform draw of elements is kept"
    source = "Fu et al. 2023"
