"""Lesson 3: the perceptron of lesson 2 in a few lines: nn.Sequential, fuse, fit."""

import torch
from course import GREEN, RED, arguments, figure, images, save
from torch import nn

import fusedmlp
from fusedmlp.train import TrainConfig, fit, predict


def init_weights(m):
    if type(m) == nn.Linear:  # noqa: E721  still true after fuse: the children stay what they are
        nn.init.normal_(m.weight, std=0.01)
        nn.init.zeros_(m.bias)


def draw(history, data, outputs):
    """Learning curves, and the first 18 test images with what the network takes them for."""
    picture = figure(13, 4)
    left, right = picture.subfigures(1, 2, width_ratios=(2, 3))
    axis = left.subplots()
    epochs = [row["epoch"] for row in history]
    axis.plot(epochs, [row["train_loss"] for row in history], label="training loss")
    axis.plot(epochs, [row["train_accuracy"] for row in history], "--", label="training accuracy")
    axis.plot(epochs, [row["test_accuracy"] for row in history], "-.", label="test accuracy")
    axis.set(xlabel="epoch", ylim=(0, 1.1))
    axis.grid(alpha=0.3)
    axis.legend()
    found = outputs.argmax(1)
    shown = zip(right.subplots(3, 6).flat, data.x_test, data.y_test, found, strict=False)
    for axis, image, truth, guess in shown:
        axis.imshow(image.reshape(data.image_shape), cmap="gray_r")
        axis.set_axis_off()
        text = data.classes[guess] if guess == truth else f"{data.classes[guess]}?"
        axis.set_title(text, color=GREEN if guess == truth else RED, fontsize=9)
    return picture


def main(argv=None):
    args = arguments(argv, __doc__, dataset="auto")
    data = images(args)

    net = nn.Sequential(
        nn.Flatten(),
        nn.Linear(data.in_features, 256),
        nn.ReLU(),
        nn.Linear(256, data.out_features),
    )
    torch.manual_seed(args.seed)
    net.apply(init_weights)
    net = fusedmlp.fuse(net)
    print(fusedmlp.report(net))
    config = TrainConfig(epochs=args.epochs, lr=0.1, batch_size=args.batch, seed=args.seed)
    history = fit(net, data, config).history

    last = history[-1]
    print(f"loss {last['train_loss']:.4f}, test accuracy {last['test_accuracy']:.2%}")
    save(draw(history, data, predict(net, data.x_test, data.scaling)), args, "lesson3_concise")
    return {"accuracy": last["test_accuracy"], "report": fusedmlp.report(net)}


if __name__ == "__main__":
    main()
