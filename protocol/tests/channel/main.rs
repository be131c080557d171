//! Both ends of the channel against each other, on transports in memory.

mod adopt;
mod calls;
mod hold;
mod machine;
mod sleep;
mod streams;
