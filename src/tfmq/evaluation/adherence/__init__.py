"""Whether pictures show what their prompts say: the interface of a judge, and the judge of scenes of
digits.
"""
