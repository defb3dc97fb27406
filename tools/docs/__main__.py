"""``python -m tools.docs`` rewrites every generated part of the pages; a test compares them."""

from tools.docs.blocks import pages, render_page


def main() -> None:
    """Rewrite the pages whose generated parts differ from the code."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        rendered = render_page(text)
        if rendered != text:
            page.write_text(rendered, encoding="utf-8")
            print(f"written  {page}")


if __name__ == "__main__":
    main()
