// of page.html
