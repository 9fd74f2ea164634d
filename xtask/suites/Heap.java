import java.nio.ByteBuffer;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.Callable;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.lang.ref.SoftReference;
import java.lang.ref.WeakReference;

/** Fills the heap from several threads, and prints what it finds in it: a name, a tab, a sum. */
public final class Heap {
    private static final int WORKERS = 3;
    private static final int ENTRIES = 60_000;
    private static final int ROUNDS = 5;

    private static final class Node {
        Node left;
        Node right;
        long value;
    }

    private static long next(long[] state) {
        state[0] ^= state[0] << 13;
        state[0] ^= state[0] >>> 7;
        state[0] ^= state[0] << 17;
        return state[0];
    }

    private static Node grow(int depth, long[] state) {
        Node node = new Node();
        node.value = next(state);
        if (depth > 0) {
            node.left = grow(depth - 1, state);
            node.right = grow(depth - 1, state);
        }
        return node;
    }

    private static long sum(Node node) {
        return node == null ? 0 : node.value + 3 * sum(node.left) + 5 * sum(node.right);
    }

    /** A map whose values are replaced again and again. */
    private static long churn(long seed) {
        long[] state = {seed};
        Map<Integer, byte[]> values = new HashMap<>();
        for (int round = 0; round < ROUNDS; round++) {
            for (int key = 0; key < ENTRIES; key++) {
                byte[] value = new byte[100 + (int) Long.remainderUnsigned(next(state), 600)];
                for (int at = 0; at < value.length; at++) {
                    value[at] = (byte) (key * 31 + round + at);
                }
                values.put(key, value);
            }
            for (int key = round; key < ENTRIES; key += 7) {
                values.remove(key);
            }
        }
        long sum = 0;
        for (Map.Entry<Integer, byte[]> entry : new TreeMap<>(values).entrySet()) {
            byte[] value = entry.getValue();
            for (int at = 0; at < value.length; at++) {
                if (value[at] != (byte) (entry.getKey() * 31 + ROUNDS - 1 + at)) {
                    throw new AssertionError("wrong byte " + at + " of " + entry.getKey());
                }
                sum = sum * 131 + value[at];
            }
        }
        return sum;
    }

    private static long strings() {
        Map<String, Integer> seen = new HashMap<>();
        for (int number = 0; number < 200_000; number++) {
            seen.merge("key number " + number % 150_000, 1, Integer::sum);
        }
        long sum = 0;
        for (Map.Entry<String, Integer> entry : new TreeMap<>(seen).entrySet()) {
            sum = sum * 31 + entry.getKey().hashCode() * 7L + entry.getValue();
        }
        return sum;
    }

    private static long direct() {
        ByteBuffer buffer = ByteBuffer.allocateDirect(32 << 20);
        while (buffer.hasRemaining()) {
            buffer.putLong(buffer.position() * 0x9E3779B97F4A7C15L);
        }
        buffer.flip();
        long sum = 0;
        while (buffer.hasRemaining()) {
            sum = sum * 31 + buffer.getLong();
        }
        return sum;
    }

    public static void main(String[] arguments) throws Exception {
        ExecutorService pool = Executors.newFixedThreadPool(WORKERS);
        List<Future<Long>> sums = new ArrayList<>();
        for (int worker = 1; worker <= WORKERS; worker++) {
            long seed = worker;
            Callable<Long> work = () -> churn(seed);
            sums.add(pool.submit(work));
        }
        long trees = 0;
        long[] state = {99};
        List<WeakReference<Node>> gone = new ArrayList<>();
        List<SoftReference<byte[]>> cache = new ArrayList<>();
        for (int round = 0; round < 6; round++) {
            Node root = grow(17, state);
            gone.add(new WeakReference<>(root));
            cache.add(new SoftReference<>(new byte[1 << 20]));
            trees = trees * 7 + sum(root);
        }
        for (int worker = 0; worker < WORKERS; worker++) {
            System.out.printf("map %d\t%x%n", worker, sums.get(worker).get());
        }
        pool.shutdown();
        System.out.printf("trees\t%x%n", trees);
        System.out.printf("strings\t%x%n", strings());
        System.out.printf("direct buffer\t%x%n", direct());
        System.gc();
        System.out.printf("after a full collection\t%x%n", churn(5));
    }
}
