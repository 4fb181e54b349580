"""Records of a pickle become what torch and NumPy make of the same parts, or are refused."""

import itertools
import math

import numpy as np
import pytest
import torch

from moco_common.reader import unpickler
from moco_common.reader.errors import MalformedError
from moco_common.reader.records import (
    ArrayRecipe,
    Discarded,
    DType,
    Mapping,
    StandIn,
    Storage,
    TensorRecipe,
    latin1,
    resolve,
)

QUANTISED = {torch.qint8, torch.quint8, torch.qint32}
FLOATS = torch.arange(24.0)


def storage(values=FLOATS):
    return Storage(values.dtype, values.numel(), values.view(torch.uint8))


def recipe(offset, size, stride, values=FLOATS):
    return TensorRecipe(storage(values), offset, size, stride)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (24,), (1,)),
        (0, (2, 3, 4), (12, 4, 1)),
        (5, (3, 2), (1, 3)),
        (23, (1,), (1,)),
        (23, (), ()),
        (0, (5, 4), (1, 1)),  # overlapping
        (1, (2, 2), (20, 2)),  # up to the last element
        (3, [2, 1], [9, 0]),
    ],
)
def test_a_tensor_is_the_strided_view_of_its_storage(offset, size, stride):
    built = recipe(offset, size, stride).build()
    assert torch.equal(built, FLOATS.as_strided(size, stride, offset))
    assert built.stride() == tuple(stride)
    assert built.untyped_storage().data_ptr() == FLOATS.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, (25,), (0,)), (0, (5, 5), (1, 1)), (0, (2, 13), (0, 1))],
)
def test_an_expanded_tensor_is_discarded(offset, size, stride):
    assert repr(recipe(offset, size, stride).build()) == "<discarded expanded tensor>"


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (1, (24,), (1,)),
        (24, (1,), (1,)),
        (2, (2, 2), (20, 2)),
        (0, (2,), (24,)),
        (0, (2, 2), (1,)),
        (0, (2,), (1, 1)),
        (-1, (2,), (1,)),
        (0, (-2,), (1,)),
        (0, (2,), (-1,)),
        (0.0, (2,), (1,)),
        (True, (2,), (1,)),
        (0, (2.0,), (1,)),
        (0, 2, (1,)),
        (1 << 62, (1,), (1,)),
        (0, (1,) * 33, (1,) * 33),
    ],
)
def test_a_tensor_beyond_its_data_or_of_no_shape_is_malformed(offset, size, stride):
    with pytest.raises(MalformedError):
        recipe(offset, size, stride).build()


def test_the_largest_number_of_dimensions_and_the_largest_stride_are_read():
    assert recipe(3, (1,) * 32, (1,) * 32).build().shape == (1,) * 32
    assert recipe(3, (1,), ((1 << 62) - 1,)).build().item() == 3


def test_an_empty_tensor_has_its_shape_wherever_it_lies():
    for offset in (0, 99):
        built = recipe(offset, (0, 4), (4, 1)).build()
        assert built.shape == (0, 4)
        assert built.dtype == torch.float32
    assert recipe(0, (0, (1 << 31) - 1), (1, 1)).build().shape == (0, (1 << 31) - 1)
    assert isinstance(recipe(0, (0, 1 << 31), (1, 1)).build(), Discarded)


def test_a_tensor_of_another_dtype_than_its_storage_reinterprets_the_bytes():
    tensor = recipe(1, (5,), (2,))
    tensor.dtype = torch.int16
    expected = FLOATS.view(torch.int16).as_strided((5,), (2,), 1)
    assert torch.equal(tensor.build(), expected)
    odd = Storage(torch.uint8, 7, torch.arange(7, dtype=torch.uint8))
    assert odd.view(torch.int16).numel() == 3  # whole elements only


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint4x2, torch.bits8, torch.float8_e5m2])
def test_a_tensor_that_torch_cannot_compute_with_is_discarded(dtype):
    tensor = recipe(0, (2,), (1,))
    tensor.dtype = dtype
    assert repr(tensor.build()) == f"<discarded tensor of {dtype}>"
    of_storage = TensorRecipe(Storage(dtype, 4, torch.zeros(4).byte()), 0, (2,), (1,))
    assert repr(of_storage.build()) == f"<discarded tensor of {dtype}>"


@pytest.mark.parametrize("dtype", sorted(set(unpickler.STORAGES.values()) - QUANTISED, key=str))
def test_every_dtype_of_a_storage_is_read(dtype):
    tensor = TensorRecipe(Storage(dtype, 2, torch.zeros(32).byte()), 0, (2,), (1,)).build()
    assert tensor.dtype == dtype
    assert torch.equal(tensor.to(torch.complex128), torch.zeros(2, dtype=torch.complex128))


def test_a_storage_knows_its_bytes_and_refuses_to_be_shorter():
    assert Storage(torch.float64, 3).nbytes == 24
    short = storage()
    short.numel += 1
    for broken in (Storage(torch.float32, 1), short):
        with pytest.raises(MalformedError, match="shorter"):
            broken.view(torch.float32)
    longer = storage()
    longer.numel -= 4
    assert torch.equal(longer.view(torch.float32), FLOATS[:20])
    with pytest.raises(MalformedError, match="without a storage"):
        TensorRecipe("x", 0, (1,), (1,)).build()


@pytest.mark.parametrize(
    ("dtype", "offset", "copied"),
    [
        (torch.uint8, 16, False),
        (torch.uint8, 8, True),
        (torch.float32, 32, False),
        (torch.float32, 4, True),
        (torch.complex128, 16, False),
        (torch.complex128, 24, True),
    ],
)
def test_elements_are_copied_once_and_only_if_they_are_not_aligned(dtype, offset, copied):
    file = torch.arange(128, dtype=torch.uint8)
    held = Storage(dtype, 32 // dtype.itemsize, file[offset : offset + 32])
    first, second = held.view(dtype), held.view(dtype)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert (first.untyped_storage().data_ptr() != file.untyped_storage().data_ptr()) == copied
    assert first.view(torch.uint8).tolist() == list(range(offset, offset + 32))


ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


def array_recipe(shape, code, fortran, data, order="<"):
    dtype, array = DType(code), ArrayRecipe()
    dtype.set_state((3, order, None))
    array.set_state((1, shape, dtype, fortran, data))
    return array


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize(
    "code", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1", "c8", "c16"]
)
def test_an_array_is_that_of_numpy(code, fortran, order):
    array = ARRAY.astype(np.dtype(code).newbyteorder(order))
    raw = array.tobytes("F" if fortran else "C")
    for data in (raw, bytearray(raw), raw.decode("latin1")):
        built = array_recipe((2, 3), code, fortran, data, order).build()
        np.testing.assert_array_equal(built.numpy(), array)
        assert built.numpy().dtype == np.dtype(code)
        built.zero_()  # writable, and not the bytes of the file
    assert array.tobytes("F" if fortran else "C") == raw


def test_an_array_made_with_its_data_is_that_of_numpy():
    built = ArrayRecipe((2, 3), "f4", ARRAY.tobytes()).build()
    np.testing.assert_array_equal(built.numpy(), ARRAY)
    assert ArrayRecipe(3, "u1", b"abc").build().tolist() == list(b"abc")
    scalar = ArrayRecipe((), "f4", ARRAY[0, 1].tobytes()).build()
    assert (scalar.shape, scalar.item()) == ((), 1.0)


@pytest.mark.parametrize("code", ["O", "V8", "U3", "S3", "M8", "f16", "", "i3"])
def test_an_array_of_other_things_than_numbers_is_discarded(code):
    assert DType(code).numpy() is None
    found = array_recipe((2,), code, False, b"x" * 16).build()
    assert isinstance(found, Discarded)
    assert repr(code) in found.name or f"'<{code}'" in found.name


def test_a_dtype_takes_byte_order_from_its_state_and_nothing_else():
    assert DType("|u1").code == "u1"
    assert DType(5).code == ""
    dtype = DType("<f4")
    dtype.set_state((3, ">"))
    assert dtype.numpy() == np.dtype(">f4")
    for state in ((3, "|"), (3,), "x", (3, "f8")):
        dtype.set_state(state)
        assert dtype.numpy() == np.dtype(">f4")


@pytest.mark.parametrize("state", [(1, (2,), DType("f4")), "x", None, ()])
def test_an_array_without_all_its_parts_is_malformed(state):
    with pytest.raises(MalformedError, match="without shape"):
        ArrayRecipe().set_state(state)


def test_an_array_whose_data_do_not_fill_its_shape_is_malformed():
    four = ArrayRecipe()
    four.set_state(((2,), DType("f4"), False, b"\0" * 8))  # without a version
    assert four.build().tolist() == [0, 0]
    for count in (7, 9, 12, 0):
        with pytest.raises(MalformedError, match="does not fill"):
            array_recipe((2,), "f4", False, bytes(count)).build()
    with pytest.raises(MalformedError, match="other characters"):
        array_recipe((1,), "u1", False, "€").build()
    assert isinstance(array_recipe((1,), "u1", False, None).build(), Discarded)


def test_text_of_old_protocols_is_the_bytes_that_it_stands_for():
    assert latin1("".join(map(chr, range(256)))) == bytes(range(256))


def test_a_mapping_takes_plain_keys_and_names_the_others():
    items = Mapping()
    pairs = {"a": 1, 2: 2, 1.5: 3, None: 4, b"\xe9": 5, (1, 2): 6}
    items.put(list(itertools.chain.from_iterable(pairs.items())))
    assert items == {"a": 1, 2: 2, 1.5: 3, None: 4, "é": 5, "'tuple'": 6}
    items.set_state({"_metadata": {"x": 1}})
    assert items.metadata == {"x": 1}
    items.set_state(())
    assert items.metadata == {"x": 1}


def test_metadata_of_this_project_come_with_the_dictionary():
    state = Mapping()
    state.put(["w", recipe(0, (2,), (1,))])
    own = Mapping()
    own.put(["depth", 50])
    state.set_state({"_metadata": {"moco-det": own, "": {"version": 1}}})
    resolved = resolve(state)
    assert resolved.pop("metadata") == {"depth": 50}
    assert list(resolved) == ["w"]
    state.set_state({"_metadata": {"": {"version": 1}}})
    assert list(resolve(state)) == ["w"]


def test_a_stand_in_keeps_its_attributes_without_slots():
    stand_in = StandIn(1, 2)
    assert isinstance(stand_in("x"), StandIn)
    for state, kept in [({"a": 1}, {"a": 1}), (({"a": 1}, {"s": 2}), {"a": 1}), ((1,), (1,))]:
        stand_in.set_state(state)
        assert stand_in.state == kept


def module(parameters, modules):
    found = StandIn()
    members = {"_parameters": parameters, "_buffers": Mapping(b=None), "_modules": modules}
    found.set_state(members)
    return found


def test_a_module_becomes_the_nested_dictionary_of_its_members():
    inner = module({"w": recipe(0, (2,), (1,))}, {})
    outer = module({}, {"inner": inner, "again": inner})
    resolved = resolve(outer)
    assert resolved["inner"] is resolved["again"]
    assert resolved["inner"]["w"].tolist() == [0, 1]
    assert list(resolved) == ["b", "inner", "again"]
    own = module({}, {})
    own.state["_modules"] = {"self": own}
    assert resolve(own)["self"].name == "part of itself"  # so that every walk comes to an end


def namespace(path, state):
    found = type("Some", (StandIn,), {"path": path})()
    found.set_state(state)
    return found


def test_arguments_of_a_script_keep_their_values_and_other_objects_their_name():
    for path in ("argparse.Namespace", "types.SimpleNamespace"):
        args = namespace(path, Mapping({"lr": 0.1, "w": recipe(0, (1,), (1,))}))
        args.state["self"] = args
        resolved = resolve(args)
        assert resolved.name == path
        assert resolved.values["lr"] == 0.1
        assert resolved.values["w"].tolist() == [0]
        assert resolved.values["self"].name == "part of itself"
    other = resolve(namespace("logging.Logger", {"lr": 0.1}))
    assert (other.name, other.values) == ("logging.Logger", {})
    assert resolve(type("Some", (StandIn,), {"path": "a.B"})).name == "a.B"
    assert resolve(DType("f4")).name == "DType"
    assert resolve(module({}, {}).__class__()).name == "object"


def test_plain_values_stay_and_shared_parts_stay_shared():
    plain = [None, True, 1, 1.5, 1j, "x", torch.float32]
    assert resolve(plain) == plain
    assert resolve(bytearray(b"a")) == b"a"
    shared = [1]
    first, (second,) = resolve((shared, [shared]))
    assert first is second
    circle = []
    circle.append(circle)
    assert resolve(circle)[0].name == "part of itself"
    own = Mapping()
    own.put(["self", own])
    assert resolve(own)["self"].name == "part of itself"
    tensor = recipe(0, (2,), (1,))
    one, other = resolve([tensor, tensor])
    assert one is other


def test_an_array_is_built_only_once():
    array = array_recipe((2,), "f4", False, bytes(8))
    one, other = resolve([array, array])
    assert one is other
    assert math.isclose(float(one.sum()), 0.0)
