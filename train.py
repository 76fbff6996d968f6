"""Train a segmentation model with attention blocks, test its best checkpoint, report mIoU beside throughput.

python train.py --help lists the settings. The story of a training is told by ``ema_seg/train.py``; the way from these
arguments to it by ``ema_seg/cli/train.py``.
"""

if __name__ == "__main__":
    # Before the slow imports: from here on a signal ends the command with a message and an exit status.
    from ema_seg.runtime.distributed.exit_handlers import install_exit_handlers

    install_exit_handlers()

    from ema_seg.cli.train import main

    main()
