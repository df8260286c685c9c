"""SPFT: the enum member under which PEFT knows this method."""

from __future__ import annotations

from peft import PeftType


def add_peft_type(name: str) -> PeftType:
    """Return the `PeftType` member `name`, adding it first where PEFT does not have it.

    PEFT refuses methods that are not in this enum, and offers no way to extend it: a plain string
    in its place trains but can neither be saved (0.20) nor loaded by transformers. The member added
    here is a real one: found by name, by value, by iteration and by pickle.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    # EnumMeta.__setattr__ knows only members that were there at class creation.
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


SPFT = add_peft_type("SPFT")
