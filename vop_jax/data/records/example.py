"""A record: a `tf.train.Example` with the JPEG frames of a clip; needs no TensorFlow."""

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from vop_jax.data.clips import VideoClip
from vop_jax.data.records.encode import Encoded

# https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/example/feature.proto
SCHEMA = """
name: "vop_jax/example.proto" package: "vop_jax" syntax: "proto3"
message_type { name: "Bytes"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "Floats"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Integers"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes" number: 1 type: TYPE_MESSAGE type_name: "Bytes" oneof_index: 0 }
  field { name: "floats" number: 2 type: TYPE_MESSAGE type_name: "Floats" oneof_index: 0 }
  field { name: "integers" number: 3 type: TYPE_MESSAGE type_name: "Integers" oneof_index: 0 } }
message_type { name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE
          type_name: "FeatureEntry" }
  nested_type { name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type: TYPE_MESSAGE type_name: "Feature" } } }
message_type { name: "Example"
  field { name: "features" number: 1 type: TYPE_MESSAGE type_name: "Features" } }
"""
_pool = descriptor_pool.DescriptorPool()
_pool.Add(text_format.Parse(SCHEMA, descriptor_pb2.FileDescriptorProto()))
Example = message_factory.GetMessageClass(_pool.FindMessageTypeByName("vop_jax.Example"))


def serialize(clip: VideoClip, encoded: Encoded) -> bytes:
    """The record of a clip, with the features of `metadata.features`."""
    example = Example()
    feature = example.features.feature
    feature["id"].bytes.value.append(clip.id.encode("utf-8", "surrogatepass"))
    feature["captions"].bytes.value.extend(text.encode() for text in clip.captions)
    feature["frames"].bytes.value.extend(encoded.jpegs)
    feature["indices"].integers.value.extend(encoded.indices)
    feature["timestamps"].floats.value.extend(encoded.timestamps)
    return example.SerializeToString(deterministic=True)  # else the order of a map is random


def parse_frames(record: bytes) -> list[bytes]:
    """The JPEG frames of a record."""
    return list(Example.FromString(record).features.feature["frames"].bytes.value)
