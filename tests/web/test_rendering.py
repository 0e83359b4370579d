"""Values are text: markup is escaped, control characters are visible."""

from lorakit.web.rendering import html_page


def test_values_are_escaped():
    page = html_page("message.html.jinja", 400, page="", text="<b>\x1b[2J\ud800</b>")
    assert page.status_code == 400
    assert b"&lt;b&gt;\\x1b[2J?&lt;/b&gt;" in page.body


def test_a_page_that_waits_asks_again():
    page = html_page("doctor.html.jinja", refresh=2, page="doctor", findings=None)
    assert page.headers["refresh"] == "2"
