"""A reader of Native DICOM Models by PS3.19 A.1.5 and the schema of A.1.6: nothing else is taken."""

from xml.etree import ElementTree as ET

NAMESPACE = "{http://dicom.nema.org/PS3.19/models/NativeDICOM}"
COMPONENTS = ["FamilyName", "GivenName", "MiddleName", "NamePrefix", "NameSuffix"]
NUMBERS = {"DS", "FD", "FL", "IS", "SL", "SS", "SV", "UL", "US", "UV"}


def read(document):
    """The DICOM JSON object that *document* says, numbers as the text they stand there in."""
    assert document.startswith(b'<?xml version="1.0" encoding="UTF-8"?>')
    root = ET.fromstring(document)
    assert root.tag == f"{NAMESPACE}NativeDicomModel"
    assert root.attrib == {"{http://www.w3.org/XML/1998/namespace}space": "preserve"}
    return read_dataset(root)


def read_dataset(element):
    found = {}
    for attribute in element:
        assert attribute.tag == f"{NAMESPACE}DicomAttribute"
        assert attribute.attrib.keys() <= {"tag", "vr", "keyword", "privateCreator"}
        tag, creator = attribute.attrib["tag"], attribute.attrib.get("privateCreator")
        if creator is not None:
            block = next(
                t[6:] for t, a in found.items() if t[:6] == f"{tag[:4]}00" and creator in a.get("Value", ())
            )
            assert tag[4:6] == "00"
            tag = f"{tag[:4]}{block}{tag[6:]}"
        assert tag not in found
        found[tag] = {"vr": attribute.attrib["vr"], **read_content(attribute, attribute.attrib["vr"])}
    return found


def read_content(attribute, vr):
    kinds = [child.tag.removeprefix(NAMESPACE) for child in attribute]
    if kinds == ["BulkData"]:
        assert attribute[0].attrib.keys() == {"uri"}
        return {"BulkDataURI": attribute[0].attrib["uri"]}
    if kinds == ["InlineBinary"]:
        return {"InlineBinary": attribute[0].text}
    assert [child.attrib for child in attribute] == [{"number": str(n + 1)} for n in range(len(kinds))]
    assert set(kinds) <= {{"SQ": "Item", "PN": "PersonName"}.get(vr, "Value")}
    reading = {"SQ": read_dataset, "PN": read_name}.get(vr, lambda child: child.text)
    return {"Value": [reading(child) for child in attribute]} if kinds else {}


def read_name(element):
    groups = {}
    for group in element:
        name = group.tag.removeprefix(NAMESPACE)
        assert name in ["Alphabetic", "Ideographic", "Phonetic"][len(groups) :]
        parts = {part.tag.removeprefix(NAMESPACE): part.text for part in group}
        assert list(parts) == [component for component in COMPONENTS if component in parts]
        groups[name] = "^".join(parts.get(component, "") for component in COMPONENTS).rstrip("^")
    return groups or None


def as_text(attributes):
    """*attributes* with numbers and what is empty as XML has them."""
    return {tag: {**attribute, **_as_text(attribute)} for tag, attribute in attributes.items()}


def _as_text(attribute):
    if "Value" not in attribute:
        return {}
    if attribute["vr"] == "SQ":
        return {"Value": [as_text(item) for item in attribute["Value"]]}
    if attribute["vr"] in NUMBERS:
        return {"Value": [None if value is None else str(value) for value in attribute["Value"]]}
    return {}
