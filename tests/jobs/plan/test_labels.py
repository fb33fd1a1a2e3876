"""What a label means for a model: each rule, what no rule reads, and what is said of both."""

import json
import unicodedata

import pytest

from blocksight.jobs.plan.labels import FoundLabels, Labels, Rule, label_fault, reading_of

NAMES = ["tench", "great white shark", "hen"]


def rule_of(labels, label):
    meaning = labels.read(label)
    return meaning.index, meaning.rule


def imagenet_names():
    names = [f"thing {index}" for index in range(1000)]
    for index, name in {
        0: "tench",
        1: "goldfish",
        217: "English springer",
        497: "church",
        999: "toilet tissue",
    }.items():
        names[index] = name
    return names


def test_labels_are_never_guessed_against_the_models_names():
    labels = Labels(["n01", "n02", "n03"], NAMES, 3)
    assert rule_of(labels, "tench") == (0, Rule.NAME)
    assert rule_of(labels, "great_white-Shark") == (1, Rule.SPELLING)
    assert rule_of(labels, "2") == rule_of(labels, 2) == (2, Rule.NUMBER)
    assert rule_of(labels, "n01") == (None, Rule.NO_CLASS)
    assert rule_of(labels, 3) == rule_of(labels, -1) == rule_of(labels, "-1") == (None, Rule.OUT_OF_RANGE)
    assert rule_of(labels, None) == (None, Rule.MISSING)


def test_as_many_folders_as_classes_without_names_are_the_classes_in_order():
    assert [rule_of(Labels(["b", "a", "c"], None, 3), name) for name in "abc"] == [(n, Rule.SORTED) for n in range(3)]
    assert Labels(["0", "10", "2"], None, 3).index("2") == 2
    assert [Labels(["0", "b", "c"], None, 3).index(name) for name in "0bc"] == [0, None, None]
    named = Labels(["bee", "ant", "cat"], ["cat", "ant", "bee"], 3)  # the class's name counts, not its position
    assert [named.index(name) for name in ("ant", "bee", "cat")] == [1, 2, 0]
    some = Labels(["bee", "ant", "dog"], ["cat", "ant", "bee"], 3)  # the third folder is no cat either
    assert [some.index(name) for name in ("ant", "bee", "dog")] == [1, 2, None]


@pytest.mark.parametrize("label", ["²", "٣", "9" * 5000, "1.5", "3", "x"])
def test_a_label_that_is_no_class_number_means_no_class(label):
    assert Labels([], ["ant", "bee", "cat"], 3).index(label) is None
    assert Labels([label, "a", "b", "c"], ["ant", "bee", "cat"], 3).index(label) is None


@pytest.mark.parametrize("label", ["1.0", "1.", "01", " 1 "])
def test_a_number_as_text_is_a_class_number(label):
    assert Labels([], None, 3).index(label) == (None if label == "1." else 1)


def test_a_number_that_is_a_class_name_is_never_another_class_in_silence():
    names = ["1", "10", "2"]  # as a training tool sorts the folders 1, 2 and 10
    folders = Labels(["10", "1", "2"], names, 3)
    assert [rule_of(folders, name) for name in names] == [(index, Rule.NAME) for index in range(3)]
    assert rule_of(folders, "0") == (0, Rule.NUMBER)
    counts = FoundLabels(dict.fromkeys(names, 1))
    assert label_fault(folders, counts, names, is_target=False) is None
    for label in ("1", 1):  # of a column: it may be the number or the name
        assert rule_of(Labels([], names, 3), label) == (None, Rule.AMBIGUOUS)
    assert "it is: 10 (class 1), 1 (class 0)" in reading_of(Labels([], names, 3), counts).text
    assert rule_of(Labels([], ["0", "1", "2"], 3), "2") == (2, Rule.NUMBER)


def test_numbers_that_a_table_names_in_another_order_are_read_by_name():
    labels = Labels([], NAMES, 3, number_names=["Hen", "cow", "tench"])
    assert [rule_of(labels, number) for number in (0, 1, 2, 3)] == [
        (2, Rule.NAMED_NUMBER),
        (None, Rule.NO_CLASS),
        (0, Rule.NAMED_NUMBER),
        (None, Rule.OUT_OF_RANGE),
    ]
    for same in (["tench", "shark", "Hen"], ["a", "b", "c"], ["0", "1", "2"], []):  # no word of another order
        assert rule_of(Labels([], NAMES, 3, number_names=same), 1) == (1, Rule.NUMBER)
    assert rule_of(Labels([], None, 3, number_names=NAMES), 1) == (1, Rule.NUMBER)
    assert rule_of(Labels([], NAMES, 3, (("0", (1,)),), ["hen", "cow"]), 0) == (1, Rule.CLASS_MAP)


def test_numbers_whose_sorted_order_is_another_are_said_loudly():
    folders = [str(number) for number in range(11)]
    text = reading_of(Labels(folders, None, 11), FoundLabels(dict.fromkeys(folders, 1))).text
    assert "GUESSED: a tool that numbers the class folders in sorted order takes 10 for class 2" in text
    for names, num_classes in ((folders, 11), (None, 12)):
        assert "GUESSED" not in reading_of(Labels(folders, names, num_classes), FoundLabels({"3": 1})).text
    assert "GUESSED" not in reading_of(Labels(folders[:10], None, 10), FoundLabels({"3": 1})).text


@pytest.mark.parametrize(
    "folders", [["day=1", "day=2", "day=3"], ["é", unicodedata.normalize("NFD", "é"), "b"], ["Cat", "cat", "dog"]]
)
def test_partitions_and_one_name_in_two_spellings_are_no_classes_in_sorted_order(folders):
    labels = Labels(folders, None, 3)
    assert [rule_of(labels, name) for name in folders] == [(None, Rule.NO_CLASS)] * 3
    assert Labels(["a=b", "c", "d"], None, 3).index("a=b") == 0


def test_a_long_label_is_cut_where_it_is_shown():
    assert "'" + "x" * 80 + "…'" in reading_of(Labels([], NAMES, 3), FoundLabels({"x" * 1000: 1})).text


def test_a_name_of_two_classes_means_neither():
    labels = Labels([], ["crane", "hen", "crane", "Hen"], 4)
    assert rule_of(labels, "crane") == (None, Rule.AMBIGUOUS)
    assert rule_of(labels, "hen") == (1, Rule.NAME)
    assert rule_of(labels, "HEN") == (None, Rule.AMBIGUOUS)
    assert "crane (class 0), crane (class 2)" in reading_of(labels, FoundLabels({"crane": 4})).text


def test_one_of_the_names_of_a_class_is_enough():
    labels = Labels([], ["tench, Tinca tinca", "crane, bird", "crane, machine"], 3)
    assert rule_of(labels, "Tinca_tinca") == (0, Rule.SYNONYM)
    assert rule_of(labels, "crane") == (None, Rule.AMBIGUOUS)


def test_names_from_a_mac_are_the_same_names():
    composed, decomposed = (unicodedata.normalize(form, "Müller") for form in ("NFC", "NFD"))
    assert composed != decomposed
    for name, folder in ((composed, decomposed), (decomposed, composed)):
        assert rule_of(Labels([folder], ["ant", name], 2), folder) == (1, Rule.SPELLING)


def test_wordnet_numbers_of_a_subset_are_imagenets_classes():
    folders = ["n01440764", "n02102040", "n03028079"]
    for names in (imagenet_names(), None):
        labels = Labels(folders, names, 1000)
        assert [rule_of(labels, name) for name in folders] == [(index, Rule.WORDNET) for index in (0, 217, 497)]
        assert "by ImageNet's WordNet numbers (n01440764 = 0" in reading_of(labels, FoundLabels({folders[0]: 1})).text
    other = imagenet_names()
    other[217] = "school bus"
    assert Labels(folders, other, 1000).index("n01440764") is None
    assert Labels(folders, None, 999).index("n01440764") is None


def test_truth_values_are_the_classes_of_a_model_of_two():
    assert [Labels([], None, 2).index(label) for label in ("False", "True")] == [0, 1]
    assert [Labels([], ["True", "False"], 2).index(label) for label in ("False", "True")] == [1, 0]
    assert Labels([], None, 3).index("True") is None


def test_a_class_map_wins_and_several_classes_are_ambiguous():
    labels = Labels([], NAMES, 3, (("dog", (0, 2)), ("fish", (1,)), ("hen", (0,)), ("far", (7,))))
    assert rule_of(labels, "fish") == (1, Rule.CLASS_MAP)
    assert rule_of(labels, "hen") == (0, Rule.CLASS_MAP)
    assert rule_of(labels, "dog") == (None, Rule.AMBIGUOUS)
    assert rule_of(labels, "far") == (None, Rule.OUT_OF_RANGE)
    assert rule_of(labels, "tench") == (0, Rule.NAME)


@pytest.mark.parametrize(("num_folders", "fault"), [(2, "one too few"), (3, None), (4, "one too many"), (5, None)])
def test_one_folder_too_few_or_too_many_is_no_column_of_null(num_folders, fault):
    folders = list("abcde")[:num_folders]
    found = label_fault(Labels(folders, None, 3), FoundLabels(dict.fromkeys(folders, 2)), folders, is_target=False)
    assert (found is None) == (fault is None)
    assert fault is None or (fault in found and "--class-map" in found)
    assert Labels(folders, None, 3).index("b") == (1 if num_folders == 3 else None)


def test_a_guess_is_said_loudly():
    text = reading_of(Labels(["b", "a"], None, 2), FoundLabels({"a": 3, "b": 1}, what="class folder")).text
    assert text.startswith("2 class folders of 4 records: 4 known GUESSED from the sorted order of the class folders (")
    assert "a = 0 … b = 1" in text


def test_numbers_from_one_on_are_not_shifted_in_silence():
    counts = {number: 1 for number in range(1, 6)}
    assert "from 1 to 5" in label_fault(Labels([], None, 5), FoundLabels(counts), [], is_target=False)
    assert label_fault(Labels([], None, 5), FoundLabels({0: 1, **counts}), [], is_target=False) is None
    assert label_fault(Labels([], None, 6), FoundLabels(counts), [], is_target=False) is None


def test_a_target_that_no_record_has_is_refused_before_work():
    labels = Labels(["tensh"], NAMES, 3)
    found = FoundLabels({"tensh": 3, None: 1})
    assert label_fault(labels, found, ["tensh"], is_target=False) is None
    fault = label_fault(labels, found, ["tensh"], is_target=True)
    assert "no label means a class" in fault
    assert fault.count("--class-map says") == 1
    assert "nearest: tench" in fault


def test_what_is_said_counts_records_and_names_what_is_unknown():
    counts = {"tench": 5, "Hen": 2, 7: 1, json.dumps([0, 1]): 4, "cow": 3, None: 6}
    reading = reading_of(Labels([], NAMES, 3), FoundLabels(counts, num_records=100))
    assert reading.num_known == 7
    assert reading.text.startswith("5 labels of 21 records (the first 21 of 100): ")
    for part in ("5 known by class name", "'cow' means no class", "'7' is no class number", "4 unknown", "6 without a"):
        assert part in reading.text
    assert reading_of(Labels([], NAMES, 3), FoundLabels({None: 6})).text == "none in the data"
