"""What the server answers, and what it says to wrong questions."""


def test_indexes(client, films, searcher):
    (about,) = client.get("/api/indexes").json()
    assert about.pop("clip")
    assert about == {
        "name": "films",
        "method": "zero_shot",
        "folder": str(films[0]),
        "files": 4,
        "moments": searcher.index.counts()["moments"],
        "captions": 2,
        "frames": 3,
    }


def test_search(client, searcher):
    answer = client.get("/api/search", params={"q": "white", "k": 2}).json()
    assert (answer["query"], answer["cut"]) == ("white", False)
    hits = searcher.text("white", 2)
    assert [(h["file_id"], h["name"], h["start"], h["end"]) for h in answer["hits"]] == [
        (hit.file_id, hit.path, hit.start, hit.end) for hit in hits
    ]
