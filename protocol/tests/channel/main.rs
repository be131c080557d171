//! Both ends of the channel against each other, on transports in memory.

mod adopt;
mod calls;
mod machine;
mod sleep;
mod streams;
