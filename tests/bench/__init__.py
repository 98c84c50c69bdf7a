"""The benchmark: the gateway beside foreign peers on this machine, in turns, as ratios.

    python -m tests.bench store      C-STORE throughput, freshness, memory, syncs, CPU
    python -m tests.bench compile    DICOM JSON of headers, from files
    python -m tests.bench serve      DICOMweb requests a second, a series in OHIF
    python -m tests.bench find       C-FIND and QIDO-RS of an archive of a million instances

Absolute figures drift with the machine and with what else it does; the ratio of two receivers that took their
turns seconds apart drifts little, and the median over rounds less.
"""
