//! Every limit gone over: what the client reads, and that its neighbour does not feel it.

use crate::rig::{Rig, get};

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_replaced_while_it_runs() {
    let rig = Rig::with(|limits| limits.max_connections = 1).await;
    let mut first = rig.h1().await;
    let many = [("a", "1"); 20];
    assert_eq!(first.send(get("x", "/", &many)).await.status, 403);
    let mut limits = config::Config::defaults().edge.limits;
    limits.max_header_fields = 16;
    rig.limits.replace(limits);
    // On a connection that is open, and for one more than there was a place for.
    let answer = first.send(get("x", "/", &many)).await;
    assert_eq!((answer.status, answer.reason()), (431, "header-too-large"));
    assert_eq!(rig.h1().await.send(get("x", "/", &[])).await.status, 403);
}
