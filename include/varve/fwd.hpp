#pragma once

#include <cstddef>

/// Names for headers that mention varve's types and use none. Concepts cannot be declared ahead: the checkpointer's
/// parameters are checked where varve/checkpointer.hpp is included.
namespace varve {

class error;
class file_format;
class file_descriptor;
class host_staging;
class loan;
class memory_sink;
class milestone_future;
class null_sink;
class observer_list;
class safetensors;
class state;
class store;
class system_calls;
class ticket;
struct checkpoint_identity;
struct checkpointer_options;
struct fetched_checkpoint;
struct event;
struct image;
struct layer;
struct relayed_run;
struct restore_options;
struct restored_checkpoint;
struct slot;
struct stall_times;
struct store_options;
struct sync;
struct tensor;

template <std::size_t N>
struct async;
template <std::size_t N>
struct layerwise;

}  // namespace varve
