"""Evaluation of a trained model: mIoU, throughput, latency, memory and FLOPs in one report.

python eval.py --help lists the settings. The story of an evaluation is told by ``ema_seg/evaluate.py``; the way from
these arguments to it by ``ema_seg/cli/eval.py``.
"""

if __name__ == "__main__":
    from ema_seg.cli.eval import main

    main()
