"""Diagrams of boxes and arrows, for the chapters about networks."""

COLOURS = {"token": "#dbe9f6", "layer": "#fde3c8", "time": "#dcf0d8", "ours": "#f6d5e5"}


def draw_flow(
    boxes: dict,  # name -> (x, y, text, key of COLOURS or plain)
    arrows: str,  # pairs of names, straight or bent: "tokens>norm tokens~plus"
    size: tuple = (9, 3),  # inches
    title: str = "",  # above the drawing
    ax=None,  # axes to draw on; None: new ones of `size`
):  # matplotlib axes
    "A diagram of boxes and arrows."
    import matplotlib.pyplot as plt

    ax = ax or plt.subplots(figsize=size)[1]
    xs, ys = [b[0] for b in boxes.values()], [b[1] for b in boxes.values()]
    ax.set(xlim=(min(xs) - 0.8, max(xs) + 0.8), ylim=(min(ys) - 0.8, max(ys) + 0.6))
    ax.set_title(title)
    ax.axis("off")
    drawn = {}
    for name, (x, y, text, kind) in boxes.items():
        box = {"boxstyle": "round,pad=0.35", "fc": COLOURS.get(kind, "white"), "ec": "0.35"}
        drawn[name] = ax.text(x, y, text, bbox=box, ha="center", va="center", fontsize=9)
    ax.figure.canvas.draw()  # from now on boxes know where arrows end
    for pair in arrows.split():
        start, end = pair.replace("~", ">").split(">")
        line = {"arrowstyle": "-|>", "color": "0.35", "shrinkA": 0, "shrinkB": 1}
        line["connectionstyle"] = f"arc3,rad={0.35 if '~' in pair else 0}"
        line["patchA"] = drawn[start].get_bbox_patch()
        line["patchB"] = drawn[end].get_bbox_patch()
        ax.annotate("", boxes[end][:2], boxes[start][:2], arrowprops=line, zorder=4)
    return ax
