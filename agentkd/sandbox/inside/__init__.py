"""What runs inside the boundary: standard library only, started from this folder alone.

``zygote`` imports the heavy modules once and clones a ``session`` for whoever asks; a session's
root process supervises, its children run the model's code (``language``). ``kernel``,
``landlock`` and ``seccomp`` take rights away; ``wire`` is the protocol with the host.

Where the boundary is a container or a virtual machine, ``supervisor`` is what runs in it: one
session and its candidates behind one stream of messages, which ``link`` starts and talks to.
"""
