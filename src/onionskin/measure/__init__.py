"""``onionskin bench``, the headline comparison with what a user would pick instead, and its report; ``onionskin demo``.

``timing`` lets contestants take turns, ``peers`` runs the other programs, ``headline`` is what is compared, ``report``
draws it, ``results`` writes JSON that ``pytest-benchmark compare`` reads. The suite in ``bench/`` builds on the first two.
"""
