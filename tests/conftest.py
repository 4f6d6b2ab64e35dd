"""What all tests share: an example of a property may take as long as it does on a busy machine."""

from hypothesis import settings

# Takes over the rest of the profile that is in force: on a CI server that is one whose examples repeat.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
